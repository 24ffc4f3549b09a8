/** Maps that are bounded: what must be remembered of what is over, or is worth keeping. Pure. */

const MOST = 65_536;

/** Enters it as the newest; beyond `most` the oldest goes. */
export function remember<Key, Value>(map: Map<Key, Value>, key: Key, value: Value, most = MOST): void {
  map.delete(key);
  map.set(key, value);
  if (map.size > most) map.delete(map.keys().next().value!);
}

/** A map that forgets its oldest entries: beyond `MOST`, and when told that a time has passed. */
export class Aging<V> {
  readonly #map = new Map<string, { readonly value: V; readonly since: number }>();

  set(key: string, value: V, now: number): void {
    remember(this.#map, key, { value, since: now });
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

  /** Forgets what was entered before that time. */
  sweep(before: number): void {
    for (const [key, { since }] of this.#map) {
      if (since >= before) return;
      this.#map.delete(key);
    }
  }
}
