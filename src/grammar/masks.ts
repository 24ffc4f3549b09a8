/**
 * Which tokens may follow. Most states allow little, and the walk over the vocabulary is short. Where much may follow (the inside of a
 * string), nearly all of the walk stays in one rule and hangs on nothing below it: that part is found once per state of the rule, and only
 * tokens that leave the rule are walked on, from where they leave it.
 */
import { PdError } from '../errors.ts';
import type { CompiledGrammar } from './compile.ts';
import { MaskParts, type PartsAhead } from './mask-parts.ts';
import { type GrammarState, GrammarStates, type StackSet } from './states.ts';
import { UniqueItems, UniquePlace } from './unique.ts';
import { type MaskPart, setBit, type Vocabulary } from './vocabulary.ts';

/** Masks that allow no more tokens are kept as a list. */
const SHORT_LIST = 1024;
/** Nodes looked at that cost what following a thread does. */
const NODES_A_STEP = 16;

/** Where a text stands. Immutable: keep them, fork them, drop them. */
export type GrammarPlace = GrammarState | UniquePlace;

/** A grammar over the tokens of a model. */
export class TokenGrammar {
  readonly #states: GrammarStates;
  readonly #tables: CompiledGrammar;
  readonly #vocabulary: Vocabulary;
  readonly #unique: UniqueItems;
  readonly #parts: MaskParts;
  /** Of what it was made from. */
  readonly #given: number;

  /** `ahead`: what has been found of its masks before. */
  constructor(tables: CompiledGrammar, vocabulary: Vocabulary, ahead?: PartsAhead) {
    this.#tables = tables;
    this.#states = new GrammarStates(tables);
    this.#unique = new UniqueItems(this.#states);
    this.#vocabulary = vocabulary;
    this.#parts = new MaskParts(tables, this.#states, vocabulary, ahead);
    this.#given = bytesIn(tables) + (ahead ? bytesIn(ahead) : 0);
  }

  /** Of memory that it takes, about. */
  get bytes(): number {
    return this.#given + this.#states.bytes + this.#parts.bytes;
  }

  get start(): GrammarPlace {
    this.#states.begin();
    const { start } = this.#states;
    return this.#unique.isNeeded ? new UniquePlace(start) : start;
  }

  /** Behind `token`; undefined where the grammar does not allow it. Throws REQUEST_INVALID where it has become too ambiguous. */
  accept(place: GrammarPlace, token: number): GrammarPlace | undefined {
    const { size, text, textStart } = this.#vocabulary.data;
    if (token < 0 || token >= size || textStart[token] === textStart[token + 1]) return undefined;
    return this.acceptBytes(place, text.subarray(textStart[token], textStart[token + 1]));
  }

  acceptBytes(place: GrammarPlace, bytes: Uint8Array): GrammarPlace | undefined {
    this.#states.begin();
    let at: GrammarPlace | null = place;
    for (const byte of bytes) {
      at = at instanceof UniquePlace ? this.#unique.step(at, byte) : this.#states.step(at, byte);
      if (at === null) return undefined;
    }
    return at;
  }

  /** Sets a bit per token that may follow, and clears all others. Throws REQUEST_INVALID where the grammar has become too ambiguous. */
  fillMask(place: GrammarPlace, mask: Uint32Array): void {
    if (mask.length !== this.#vocabulary.words) {
      throw new PdError('INTERNAL', `a mask of ${mask.length} words for ${this.#vocabulary.words}`);
    }
    this.#states.begin();
    const state = place instanceof UniquePlace ? place.state : place;
    const found = state.mask ?? this.#maskOf(state);
    if (!state.mask) this.#states.keepMask(state, found);
    if (found instanceof Uint32Array) mask.set(found);
    else {
      mask.fill(0);
      for (const token of found) setBit(mask, token);
    }
    if (place instanceof UniquePlace) this.#unique.forbid(place, this.#vocabulary.data, mask);
  }

  #maskOf({ threads, stacks }: GrammarState): Int32Array | Uint32Array {
    const { numStates } = this.#tables;
    const mask = new Mask(this.#vocabulary.words);
    const narrow: number[] = [];
    threads.forEach((thread, i) => {
      const part = this.#parts.ready(thread % numStates, stacks[i]!.depth);
      if (part) this.#addPart(part, thread, stacks[i]!, mask);
      else narrow.push(i);
    });
    // Together first: the same bytes lead on from many of them.
    const some = (places: readonly number[]) =>
      this.#states.some(
        places.map((i) => threads[i]!),
        places.map((i) => stacks[i]!),
      );
    const together = narrow.length > 0 ? this.#parts.shortWalk(some(narrow)) : undefined;
    if (together) mask.addAll(together.tokens);
    else {
      for (const i of narrow) {
        const one = some([i]);
        const short = this.#parts.shortWalk(one);
        const part = short ? undefined : this.#parts.wide(threads[i]! % numStates, stacks[i]!.depth);
        if (part) this.#addPart(part, threads[i]!, stacks[i]!, mask);
        else mask.addAll((short ?? this.#parts.longWalk(one)).tokens);
      }
    }
    return mask.done();
  }

  #addPart(part: MaskPart, thread: number, stack: StackSet, mask: Mask): void {
    const { most, least } = this.#countsLeft(thread);
    if (part.tokens instanceof Uint32Array) this.#look(part.tokens.length);
    mask.addPart(part, most);
    this.#addExits(part, least, most, this.#states.popped(stack), mask);
  }

  /** How many more a counted rule may begin, and must have begun before it ends. */
  #countsLeft(thread: number): { readonly most: number; readonly least: number } {
    const { numStates, counted, countedMin, countedMax } = this.#tables;
    const rule = counted[thread % numStates]!;
    if (rule < 0) return { most: Number.POSITIVE_INFINITY, least: 0 };
    const count = Math.floor(thread / numStates);
    const max = countedMax[rule]!;
    return { most: max < 0 ? Number.POSITIVE_INFINITY : max - count, least: countedMin[rule]! - count };
  }

  /** Tokens that leave the rule on their way and go on in `after`. */
  #addExits(part: MaskPart, least: number, most: number, after: GrammarState, mask: Mask): void {
    if (after.isOver) return;
    const { bytes, ends, parents, byByteStart, byByte } = this.#vocabulary.data;
    if (part.exitAt) {
      for (let byte = 0; byte < 256; byte++) {
        const next = this.#states.step(after, byte);
        if (next === null) continue;
        this.#look(byByteStart[byte + 1]! - byByteStart[byte]!);
        for (let i = byByteStart[byte]!; i < byByteStart[byte + 1]!; i++) {
          const node = byByte[i]!;
          const at = part.exitAt[parents[node]!]!;
          if (at > 0 && at - 1 >= least && at - 1 <= most) this.#walk(node, next, mask);
        }
      }
      return;
    }
    this.#look(part.exits.length);
    part.exits.forEach((exit, i) => {
      const count = part.exitCounts?.[i] ?? 0;
      if (count < least || count > most) return;
      for (let child = exit + 1; child < ends[exit]!; child = ends[child]!) {
        const next = this.#states.step(after, bytes[child]!);
        if (next !== null) this.#walk(child, next, mask);
      }
    });
  }

  /** Allows the tokens at and below `first`, which `state` has been reached by. */
  #walk(first: number, state: GrammarState, mask: Mask): void {
    const { bytes, depths, ends, tokenStart, tokens } = this.#vocabulary.data;
    const base = depths[first]!;
    const states = [state];
    let looked = 1;
    for (let i = tokenStart[first]!; i < tokenStart[first + 1]!; i++) mask.add(tokens[i]!);
    for (let node = first + 1; node < ends[first]!; ) {
      looked++;
      const depth = depths[node]! - base;
      const next = this.#states.step(states[depth - 1]!, bytes[node]!);
      if (next === null) {
        node = ends[node]!;
        continue;
      }
      states[depth] = next;
      for (let i = tokenStart[node]!; i < tokenStart[node + 1]!; i++) mask.add(tokens[i]!);
      node++;
    }
    this.#look(looked);
  }

  #look(nodes: number): void {
    this.#states.spend(nodes / NODES_A_STEP);
  }
}

/** Of its arrays of numbers. */
function bytesIn(data: object): number {
  return Object.values(data).reduce<number>(
    (sum, value: unknown) => sum + (ArrayBuffer.isView(value) ? value.byteLength : 0),
    0,
  );
}

/** Tokens that are allowed as they are found: most as bits at once, others one by one, perhaps twice. */
class Mask {
  readonly #words: number;
  readonly #few: number[] = [];
  #bits: Uint32Array | undefined;

  constructor(words: number) {
    this.#words = words;
  }

  add(token: number): void {
    if (this.#bits) setBit(this.#bits, token);
    else this.#few.push(token);
  }

  addAll(tokens: readonly number[]): void {
    for (const token of tokens) this.add(token);
  }

  /** Of a counted rule, tokens that begin `most` at most. */
  addPart({ tokens, byCount }: MaskPart, most: number): void {
    if (tokens instanceof Uint32Array) {
      const bits = this.#asBits();
      const allowed = without(tokens, byCount, most);
      for (let i = 0; i < bits.length; i++) bits[i]! |= allowed[i]!;
      return;
    }
    for (let i = 0; i < tokens.length && (!byCount || byCount.counts[i]! <= most); i++) this.add(tokens[i]!);
  }

  done(): Int32Array | Uint32Array {
    return this.#bits || this.#few.length > SHORT_LIST ? this.#asBits() : Int32Array.from(this.#few);
  }

  #asBits(): Uint32Array {
    if (!this.#bits) {
      this.#bits = new Uint32Array(this.#words);
      for (const token of this.#few) setBit(this.#bits, token);
    }
    return this.#bits;
  }
}

function without(tokens: Uint32Array, byCount: MaskPart['byCount'], most: number): Uint32Array {
  if (!byCount || most >= (byCount.counts.at(-1) ?? 0)) return tokens;
  const { tokens: sorted, counts } = byCount;
  const allowed = tokens.slice();
  for (let i = sorted.length - 1; i >= 0 && counts[i]! > most; i--) {
    allowed[sorted[i]! >>> 5]! &= ~(1 << (sorted[i]! & 31));
  }
  return allowed;
}
