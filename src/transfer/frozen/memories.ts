/** What must be remembered of requests that hold no tensor. Pure, and bounded. */

interface Prompted {
  readonly promptDigest?: string | undefined;
}

/** Both know of which prompt they are, and it is not the same one. */
export function contradicts(a: Prompted, b: Prompted): boolean {
  return a.promptDigest !== undefined && b.promptDigest !== undefined && a.promptDigest !== b.promptDigest;
}

const MOST = 65_536;

/** A map that forgets its oldest entries: beyond `MOST`, and when told that a time has passed. */
export class Aging<V> {
  readonly #map = new Map<string, { readonly value: V; readonly since: number }>();

  set(key: string, value: V, now: number): void {
    this.#map.delete(key);
    this.#map.set(key, { value, since: now });
    if (this.#map.size > MOST) this.#map.delete(this.#map.keys().next().value!);
  }

  get(key: string): V | undefined {
    return this.#map.get(key)?.value;
  }

  delete(key: string): void {
    this.#map.delete(key);
  }

  get size(): number {
    return this.#map.size;
  }

  sweep(before: number): void {
    for (const [key, { since }] of this.#map) {
      if (since >= before) return;
      this.#map.delete(key);
    }
  }
}
