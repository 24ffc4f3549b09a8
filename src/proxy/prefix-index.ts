/**
 * Which blocks instances have, by the keys that they publish (kv-feeds.ts). A prompt is a chain of keys, each of which stands for all of it up
 * to there. Pure, bounded, and only ever a hint: whoever goes by it and errs has computed a prompt anew.
 */

/** Keys of all instances together; some 100 bytes each. */
const MOST_KEYS = 4 * 2 ** 20;

export class PrefixIndex {
  readonly #known = new Map<string, Set<string>>();
  readonly #mostKeys: number;
  #size = 0;

  /** `mostKeys`: of all instances together. */
  constructor(mostKeys = MOST_KEYS) {
    this.#mostKeys = mostKeys;
  }

  /** Keys that an instance has from now on. Where there are over `most` it has lied, or said so much that some must be forgotten. */
  insert(address: string, keys: readonly string[], most: number): void {
    const known = this.#setOf(address);
    for (const key of keys) {
      const before = known.size;
      known.add(key);
      this.#size += known.size - before;
    }
    this.#shrink(known, most);
  }

  remove(address: string, keys: readonly string[]): void {
    const known = this.#known.get(address);
    if (!known) return;
    for (const key of keys) if (known.delete(key)) this.#size--;
  }

  /** How many of `keys` from the first the instance has, or is about to have. */
  leading(address: string, keys: readonly string[], coming?: ReadonlyMap<string, unknown>): number {
    const known = this.#known.get(address);
    let count = 0;
    while (count < keys.length && (known?.has(keys[count]!) || coming?.has(keys[count]!))) count++;
    return count;
  }

  /** The instance has gone, or what it had. */
  forget(address: string): void {
    this.#size -= this.#known.get(address)?.size ?? 0;
    this.#known.delete(address);
  }

  sizeOf(address: string): number {
    return this.#known.get(address)?.size ?? 0;
  }

  get size(): number {
    return this.#size;
  }

  #setOf(address: string): Set<string> {
    const known = this.#known.get(address) ?? new Set();
    this.#known.set(address, known);
    return known;
  }

  /**
   * Where there are too many, so many go and an eighth of the rest: looking for the first key walks over all that have been deleted before
   * it, so that is done seldom.
   */
  #shrink(known: Set<string>, most: number): void {
    const over = Math.max(known.size - most, this.#size - this.#mostKeys);
    if (over <= 0) return;
    let left = over + Math.floor(Math.max(0, known.size - over) / 8);
    for (const key of known) {
      if (left-- === 0) return;
      known.delete(key);
      this.#size--;
    }
  }
}
