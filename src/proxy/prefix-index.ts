/**
 * Who has the KV of which beginnings of prompts. A prompt is a chain of keys, each of which stands for all of it up to there; what an
 * instance has is a set of them. Pure, bounded, and only ever a hint: whoever goes by it and errs has computed a prompt anew.
 */
import { hash } from 'node:crypto';

/** Characters of a prompt that one key of its text stands for: some 32 tokens. */
export const TEXT_CHUNK = 128;
/** Of one text. */
const MAX_TEXT_KEYS = 8_192;

/** Keys of a text, one for each full chunk. `scope`: what else its KV depends on, such as the model's name. */
export function textKeys(text: string, scope: string): string[] {
  const keys: string[] = [];
  let before = scope;
  const end = Math.min(text.length, MAX_TEXT_KEYS * TEXT_CHUNK);
  for (let at = 0; at + TEXT_CHUNK <= end; at += TEXT_CHUNK) {
    before = hash('sha256', `${before}\n${text.slice(at, at + TEXT_CHUNK)}`, 'base64').slice(0, 12);
    keys.push(before);
  }
  return keys;
}

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

  /** Keys that an instance has used just now, in the order of the prompt. The least recently used go where there are over `most`. */
  use(address: string, keys: readonly string[], most: number): void {
    const known = this.#setOf(address);
    const before = known.size;
    // The last first: of a prompt whose beginning has gone the rest is of no use.
    for (let i = Math.min(keys.length, most) - 1; i >= 0; i--) {
      known.delete(keys[i]!);
      known.add(keys[i]!);
    }
    this.#size += known.size - before;
    this.#shrink(known, most, Math.min(keys.length, most));
  }

  /** Keys that an instance has from now on. Where there are over `most` it has lied, or said so much that some must be forgotten. */
  insert(address: string, keys: readonly string[], most: number): void {
    const known = this.#setOf(address);
    for (const key of keys) {
      const before = known.size;
      known.add(key);
      this.#size += known.size - before;
    }
    this.#shrink(known, most, 0);
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
   * it, so that is done seldom. `used`: those that came just now, at the end, which stay if they can.
   */
  #shrink(known: Set<string>, most: number, used: number): void {
    const over = Math.max(known.size - most, this.#size - this.#mostKeys);
    if (over <= 0) return;
    const spare = Math.floor(Math.max(0, known.size - over) / 8);
    let left = Math.max(over, Math.min(over + spare, known.size - used));
    for (const key of known) {
      if (left-- === 0) return;
      known.delete(key);
      this.#size--;
    }
  }
}
