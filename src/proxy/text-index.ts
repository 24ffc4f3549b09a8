/**
 * Which instances have been sent which texts. A text is a chain of keys, each of which stands for all of it up to there, so whoever has one has
 * those before it. Pure, bounded, and only ever a hint: whoever goes by it and errs has computed a prompt anew.
 */

/** Of what is hashed, bytes. */
const WORD = 4;
/** Bytes of a prompt's text that one key stands for, at its beginning: some 64 tokens. */
const TEXT_CHUNK = 256;
/** Further on a chunk is this share of what is before it: of a long prompt that much may be misjudged, and few keys do. */
const CHUNK_SHARE = 1 / 64;
/** Of one text, bytes. */
const MOST_TEXT = 4 * 2 ** 20;
/** Of English in JSON, about; and of a token id, as it lies in memory. */
export const BYTES_PER_TOKEN = 4;

/** Bytes of a text up to the end of each of its chunks. */
const CHUNK_ENDS: readonly number[] = (() => {
  const ends: number[] = [];
  for (let end = TEXT_CHUNK; end <= MOST_TEXT; ) {
    ends.push(end);
    end += Math.max(TEXT_CHUNK, Math.floor((end * CHUNK_SHARE) / WORD) * WORD);
  }
  return ends;
})();

/** A key is a number: which chunk it ends in, and in the bits above a hash of the text up to there. */
const PLACES = 2 ** 10;

/**
 * Keys of a text, one for each full chunk. `scope`: what else its KV depends on, such as the model's name. The hash is a quick one: who
 * makes two texts that have it in common makes a wrong hint, and can do that by asking for either.
 */
export function textKeys(text: Uint8Array, scope: string): number[] {
  const length = Math.min(text.length, MOST_TEXT);
  if (length < TEXT_CHUNK) return [];
  // A copy, as words must lie where words can.
  const words = new Int32Array(new Uint8Array(text.subarray(0, length - (length % WORD))).buffer);
  let [a, b] = [0x2545f491, 0x1b873593];
  for (let i = 0; i < scope.length; i++) {
    a = Math.imul(a ^ scope.charCodeAt(i), 0x85ebca6b);
    b = Math.imul(b ^ a, 0xc2b2ae35);
  }
  const keys: number[] = [];
  let at = 0;
  for (const chunkEnd of CHUNK_ENDS) {
    if (chunkEnd > length) break;
    for (const end = chunkEnd / WORD; at < end; at++) {
      const word = words[at]!;
      a = Math.imul(a ^ word, 0x85ebca6b);
      a = (a << 13) | (a >>> 19);
      b = Math.imul(b ^ word, 0xc2b2ae35);
      b = (b << 17) | (b >>> 15);
    }
    let high = Math.imul(a ^ (b >>> 16), 0x2c1b3c6d);
    high ^= high >>> 15;
    const low = Math.imul(b ^ (high >>> 13), 0x297a2d39);
    // 32 bits, 11 bits, and the place: as much as a number holds.
    keys.push((high >>> 0) * 2 ** 21 + (low >>> 21) * PLACES + keys.length);
  }
  return keys;
}

/** What the first `count` keys stand for. */
function tokensOf(count: number): number {
  return count === 0 ? 0 : CHUNK_ENDS[count - 1]! / BYTES_PER_TOKEN;
}

/** Of the last chunk that a key stands for. */
function tokensOfKey(key: number): number {
  const place = key % PLACES;
  return tokensOf(place + 1) - tokensOf(place);
}

/** Keys of all instances together; some 100 bytes each. */
const MOST_KEYS = 4 * 2 ** 20;
/** Of the room of an instance: what came into use together goes together. */
const GENERATION = 1 / 8;

/** What one instance has. */
interface Known {
  /** In which generation each key was used last. To keep them in the order of their use would take each out and put it in again. */
  readonly keys: Map<number, number>;
  /** Tokens of each generation that has any, the oldest first. */
  readonly generations: Map<number, number>;
  tokens: number;
  latest: number;
}

export class TextIndex {
  readonly #known = new Map<string, Known>();
  readonly #mostKeys: number;
  #size = 0;

  /** `mostKeys`: of all instances together. */
  constructor(mostKeys = MOST_KEYS) {
    this.#mostKeys = mostKeys;
  }

  /**
   * Keys that an instance has used just now, in the order of the text; from the first as many as there is room for, which is `most` tokens. The
   * least recently used make way.
   */
  use(address: string, keys: readonly number[], most: number): void {
    let used = 0;
    while (used < keys.length && tokensOf(used + 1) <= most) used++;
    if (used === 0) return;
    const known = this.#knownOf(address);
    if (known.keys.get(keys[used - 1]!) === known.latest) return;
    const held = known.generations.get(known.latest) ?? 0;
    if (held > 0 && held + tokensOf(used) > most * GENERATION) known.latest++;
    // The last first: those before a key of the latest generation are of it, too.
    for (let i = used - 1; i >= 0 && known.keys.get(keys[i]!) !== known.latest; i--)
      this.#put(known, keys[i]!);
    this.#shrink(known, most);
    if (this.#size > this.#mostKeys) this.forget(address);
  }

  /** About how many tokens of the text that has `keys` the instance has, from the first. */
  leading(address: string, keys: readonly number[]): number {
    const known = this.#known.get(address)?.keys;
    let count = 0;
    while (count < keys.length && known?.has(keys[count]!)) count++;
    return tokensOf(count);
  }

  /** The instance has gone, or what it had. */
  forget(address: string): void {
    this.#size -= this.#known.get(address)?.keys.size ?? 0;
    this.#known.delete(address);
  }

  #knownOf(address: string): Known {
    const known = this.#known.get(address) ?? {
      keys: new Map(),
      generations: new Map(),
      tokens: 0,
      latest: 0,
    };
    this.#known.set(address, known);
    return known;
  }

  #put(known: Known, key: number): void {
    const { keys, generations, latest } = known;
    const tokens = tokensOfKey(key);
    const before = keys.get(key);
    if (before === undefined) {
      known.tokens += tokens;
      this.#size++;
    } else {
      const left = generations.get(before)! - tokens;
      if (left > 0) generations.set(before, left);
      else generations.delete(before);
    }
    keys.set(key, latest);
    generations.set(latest, (generations.get(latest) ?? 0) + tokens);
  }

  /** What was used just now stays. */
  #shrink(known: Known, most: number): void {
    if (known.tokens <= most) return;
    const { keys, generations, latest } = known;
    let oldest = Number.NEGATIVE_INFINITY;
    for (const [generation, tokens] of generations) {
      if (generation === latest || known.tokens <= most) break;
      oldest = generation;
      generations.delete(generation);
      known.tokens -= tokens;
    }
    if (oldest === Number.NEGATIVE_INFINITY) return;
    for (const [key, generation] of keys) {
      if (generation > oldest) continue;
      keys.delete(key);
      this.#size--;
    }
  }
}
