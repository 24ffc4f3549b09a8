/** The tokens of a model as a trie over their bytes, laid out flat in preorder: what a mask is found by walking. */
import { deserialize } from 'node:v8';

/** Plain data over typed arrays: crosses threads as it is. Node 0 is the root. */
export interface VocabularyData {
  /** Ids run from 0 to `size` - 1. */
  readonly size: number;
  /** Per node: the byte that leads to it, its depth, and the first node behind its subtree. */
  readonly bytes: Uint8Array;
  readonly depths: Uint16Array;
  readonly ends: Int32Array;
  readonly parents: Int32Array;
  /** Nodes that byte b leads to: `byByte[byByteStart[b]]` to `byByte[byByteStart[b + 1] - 1]`. */
  readonly byByteStart: Int32Array;
  readonly byByte: Int32Array;
  /** Tokens that end in node n: `tokens[tokenStart[n]]` to `tokens[tokenStart[n + 1] - 1]`. */
  readonly tokenStart: Int32Array;
  readonly tokens: Int32Array;
  /** Bytes of token t: `text[textStart[t]]` to `text[textStart[t + 1] - 1]`; none where a grammar may never draw it. */
  readonly textStart: Int32Array;
  readonly text: Uint8Array;
  /** Per node, what tokens do below it: bits of CROSSES. */
  readonly crosses: Uint8Array;
  /** Parts of masks found before (what `commonParts` returns, serialized): as hundreds of arrays they would cost every request that carries them. */
  readonly parts?: Uint8Array;
}

/** Marks of JSON in this order, perhaps with others between them: a comma; the end of a string and one; a bracket and one. */
export const CROSSES = { item: 1, stringAndItem: 2, intoItem: 4 } as const;

/** Of a state in a rule: what is allowed without a look below the rule. */
export interface MaskPart {
  /** A bit per token; of few their ids, in a counted rule those first that begin fewest. */
  readonly tokens: Uint32Array | Int32Array;
  /** Nodes within tokens where the rule may end. */
  readonly exits: Int32Array;
  /** Where there are many: 1 and the count at node n, 0 where it is no exit. */
  readonly exitAt: Uint16Array | undefined;
  /** In a counted rule: how many more are begun by then, per exit; and the tokens with theirs, fewest first (of bits, those that begin any). */
  readonly exitCounts: Uint16Array | undefined;
  readonly byCount: { readonly tokens: Int32Array; readonly counts: Uint16Array } | undefined;
  /** Calls that had to be possible above the state to find it. Where so many are not, other tokens may follow. */
  readonly depth: number;
}

/** A vocabulary with what is known of it once and for all grammars. */
export class Vocabulary {
  readonly data: VocabularyData;
  readonly words: number;
  /** Parts by the shape of their rule: those that came along, and those found since. */
  readonly known: ReadonlyMap<string, MaskPart>;
  readonly parts = new Map<string, MaskPart>();

  constructor(data: VocabularyData) {
    this.data = data;
    this.known = new Map(data.parts && (deserialize(data.parts) as [string, MaskPart][]));
    this.words = maskWords(data.size);
  }
}

/** `tokens` by id; undefined (special tokens, ids without one) and empty: never drawn under a grammar. */
export function vocabularyOf(tokens: readonly (Uint8Array | undefined)[]): VocabularyData {
  const size = tokens.length;
  const textStart = new Int32Array(size + 1);
  for (let id = 0; id < size; id++) textStart[id + 1] = textStart[id]! + (tokens[id]?.length ?? 0);
  const text = new Uint8Array(textStart[size]!);
  tokens.forEach((bytes, id) => {
    if (bytes) text.set(bytes, textStart[id]);
  });
  const ids = Array.from(tokens.keys()).filter((id) => textStart[id + 1]! > textStart[id]!);
  ids.sort(
    (a, b) => compareBytes(text, textStart[a]!, textStart[a + 1]!, textStart[b]!, textStart[b + 1]!) || a - b,
  );

  const bytes: number[] = [0];
  const depths: number[] = [0];
  const parents: number[] = [-1];
  const tokenStart: number[] = [0];
  const ends = [0];
  const ordered: number[] = [];
  /** Nodes from the root to the last token's. */
  const path = [0];
  let before = { start: 0, length: 0 };
  for (const id of ids) {
    const start = textStart[id]!;
    const length = textStart[id + 1]! - start;
    let shared = 0;
    while (
      shared < length &&
      shared < before.length &&
      text[start + shared] === text[before.start + shared]
    ) {
      shared++;
    }
    while (path.length > shared + 1) ends[path.pop()!] = bytes.length;
    for (let depth = shared; depth < length; depth++) {
      parents.push(path.at(-1)!);
      path.push(bytes.length);
      bytes.push(text[start + depth]!);
      depths.push(depth + 1);
      tokenStart.push(ordered.length);
      ends.push(0);
    }
    ordered.push(id);
    before = { start, length };
  }
  for (const node of path) ends[node] = bytes.length;
  tokenStart.push(ordered.length);
  return {
    size,
    bytes: Uint8Array.from(bytes),
    depths: Uint16Array.from(depths),
    ends: Int32Array.from(ends),
    parents: Int32Array.from(parents),
    ...nodesByByte(bytes),
    tokenStart: Int32Array.from(tokenStart),
    tokens: Int32Array.from(ordered),
    textStart,
    text,
    crosses: crossesOf(bytes, parents),
  };
}

function crossesOf(bytes: readonly number[], parents: readonly number[]): Uint8Array {
  const crosses = new Uint8Array(bytes.length);
  for (let node = bytes.length - 1; node > 0; node--) {
    const below = crosses[node]!;
    let own = below;
    if (bytes[node] === 0x2c) own |= CROSSES.item;
    if (bytes[node] === 0x22 && below & CROSSES.item) own |= CROSSES.stringAndItem;
    if (bytes[node] === 0x5b && below & CROSSES.item) own |= CROSSES.intoItem;
    crosses[parents[node]!]! |= own;
  }
  return crosses;
}

function nodesByByte(bytes: readonly number[]): Pick<VocabularyData, 'byByteStart' | 'byByte'> {
  const byByteStart = new Int32Array(257);
  for (let node = 1; node < bytes.length; node++) byByteStart[bytes[node]! + 1]!++;
  for (let byte = 0; byte < 256; byte++) byByteStart[byte + 1]! += byByteStart[byte]!;
  const next = byByteStart.slice();
  const byByte = new Int32Array(bytes.length - 1);
  for (let node = 1; node < bytes.length; node++) byByte[next[bytes[node]!]!++] = node;
  return { byByteStart, byByte };
}

function compareBytes(text: Uint8Array, a: number, aEnd: number, b: number, bEnd: number): number {
  for (; a < aEnd && b < bEnd; a++, b++) {
    if (text[a] !== text[b]) return text[a]! - text[b]!;
  }
  return aEnd - a - (bEnd - b);
}

/** Words of a mask over `size` tokens: bit `id & 31` of word `id >>> 5`. */
function maskWords(size: number): number {
  return Math.ceil(size / 32);
}

export function setBit(bits: Uint32Array, token: number): void {
  bits[token >>> 5]! |= 1 << (token & 31);
}
