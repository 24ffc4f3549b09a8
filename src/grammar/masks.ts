/**
 * Which tokens may follow. Most states allow little, and the walk over the vocabulary is short. Where much may follow (the inside of a
 * string), nearly all of the walk stays in one rule and hangs on nothing below it: that part is found once per state of the rule, and only
 * tokens that leave the rule are walked on, from where they leave it.
 */
import { PdError } from '../errors.ts';
import type { CompiledGrammar } from './compile.ts';
import { type GrammarState, GrammarStates, type StackSet } from './states.ts';
import { UniqueItems, UniquePlace } from './unique.ts';
import { type MaskPart, maskWords, type VocabularyData } from './vocabulary.ts';

/** Nodes of the vocabulary looked at before a walk counts as long. */
const SHORT_WALK = 6000;
/** Masks that allow no more tokens are kept as a list. */
const SHORT_LIST = 1024;
/** Places where a rule is left, above which they are looked up by the byte that comes next. */
const FEW_EXITS = 2048;
/** A table of a rule takes half a kilobyte a state. */
const MOST_FLAT_STATES = 1024;
/** Parts of masks kept per grammar, and of those that all grammars share. */
const MOST_PARTS = 48;
/** Nodes looked at that cost what following a thread does. */
const NODES_A_STEP = 16;

/** A vocabulary with what is known of it once and for all grammars. */
export class Vocabulary {
  readonly data: VocabularyData;
  readonly words: number;
  /** Parts by the shape of their rule: those that came along, and those found since. */
  readonly known: ReadonlyMap<string, MaskPart>;
  readonly parts = new Map<string, MaskPart>();

  constructor(data: VocabularyData) {
    this.data = data;
    this.known = new Map(data.parts);
    this.words = maskWords(data.size);
  }
}

/** Where a text stands. Immutable: keep them, fork them, drop them. */
export type GrammarPlace = GrammarState | UniquePlace;

/** A grammar over the tokens of a model. */
export class TokenGrammar {
  readonly #states: GrammarStates;
  readonly #tables: CompiledGrammar;
  readonly #vocabulary: Vocabulary;
  readonly #unique: UniqueItems;
  readonly #parts = new Map<number, MaskPart>();
  /** Of states of the tables: whether their part is worth to be found. */
  readonly #wide = new Map<number, boolean>();

  constructor(tables: CompiledGrammar, vocabulary: Vocabulary) {
    this.#tables = tables;
    this.#states = new GrammarStates(tables);
    this.#unique = new UniqueItems(this.#states);
    this.#vocabulary = vocabulary;
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
    state.mask ??= this.#maskOf(state);
    if (state.mask instanceof Uint32Array) mask.set(state.mask);
    else {
      mask.fill(0);
      for (const token of state.mask) setBit(mask, token);
    }
    if (place instanceof UniquePlace) this.#unique.forbid(place, this.#vocabulary.data, mask);
  }

  #maskOf(state: GrammarState): Int32Array | Uint32Array {
    const [wide, narrow]: [number[], number[]] = [[], []];
    state.threads.forEach((thread, i) => {
      (this.#isWide(thread) ? wide : narrow).push(i);
    });
    const few = narrow.length > 0 ? this.#shortWalk(this.#states.part(state, narrow)) : [];
    if (few && few.length <= SHORT_LIST && wide.length === 0) return Int32Array.from(few);
    const bits = new Uint32Array(this.#vocabulary.words);
    if (few) for (const token of few) setBit(bits, token);
    else for (const i of narrow) this.#addNarrow(state.threads[i]!, state.stacks[i]!, bits);
    for (const i of wide) this.#addWide(state.threads[i]!, state.stacks[i]!, bits);
    return listOf(bits) ?? bits;
  }

  /** Whether what `thread` allows is found as a part: of a counted rule it serves for all counts, and what is known is there. */
  #isWide(thread: number): boolean {
    const state = thread % this.#tables.numStates;
    let isWide = this.#wide.get(state);
    if (isWide === undefined) {
      isWide = this.#tables.counted[state]! >= 0 || this.#knownPart(state) !== undefined;
      this.#wide.set(state, isWide);
    }
    return isWide;
  }

  #addNarrow(thread: number, stack: StackSet, bits: Uint32Array): void {
    const few = this.#shortWalk(this.#states.single(thread, stack));
    if (few) {
      for (const token of few) setBit(bits, token);
      return;
    }
    this.#wide.set(thread % this.#tables.numStates, true);
    this.#addWide(thread, stack, bits);
  }

  #addWide(thread: number, stack: StackSet, bits: Uint32Array): void {
    const part = this.#partOf(thread % this.#tables.numStates);
    this.#look(bits.length);
    const { most, least } = this.#countsLeft(thread);
    addTokens(part, most, bits);
    this.#addExits(part, least, most, this.#states.popped(stack), bits);
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
  #addExits(part: MaskPart, least: number, most: number, after: GrammarState, bits: Uint32Array): void {
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
          if (at > 0 && at - 1 >= least && at - 1 <= most) this.#walk(node, next, bits);
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
        if (next !== null) this.#walk(child, next, bits);
      }
    });
  }

  /** Allows the tokens at and below `first`, which `state` has been reached by. */
  #walk(first: number, state: GrammarState, bits: Uint32Array): void {
    const { bytes, depths, ends, tokenStart, tokens } = this.#vocabulary.data;
    const base = depths[first]!;
    const states = [state];
    let looked = 1;
    for (let i = tokenStart[first]!; i < tokenStart[first + 1]!; i++) setBit(bits, tokens[i]!);
    for (let node = first + 1; node < ends[first]!; ) {
      looked++;
      const depth = depths[node]! - base;
      const next = this.#states.step(states[depth - 1]!, bytes[node]!);
      if (next === null) {
        node = ends[node]!;
        continue;
      }
      states[depth] = next;
      for (let i = tokenStart[node]!; i < tokenStart[node + 1]!; i++) setBit(bits, tokens[i]!);
      node++;
    }
    this.#look(looked);
  }

  #look(nodes: number): void {
    this.#states.spend(nodes / NODES_A_STEP);
  }

  /** Every token that may follow `state`, or undefined where finding them is long. */
  #shortWalk(state: GrammarState): number[] | undefined {
    const { bytes, depths, ends, tokenStart, tokens } = this.#vocabulary.data;
    const found: number[] = [];
    const states = [state];
    let looked = 0;
    for (let node = 1; node < bytes.length; ) {
      if (++looked > SHORT_WALK) return undefined;
      const depth = depths[node]!;
      const next = this.#states.step(states[depth - 1]!, bytes[node]!);
      if (next === null) {
        node = ends[node]!;
        continue;
      }
      states[depth] = next;
      for (let i = tokenStart[node]!; i < tokenStart[node + 1]!; i++) found.push(tokens[i]!);
      node++;
    }
    return found;
  }

  #partOf(state: number): MaskPart {
    const key = this.#shapeKey(state);
    if (key === undefined) return remembered(this.#parts, state, () => this.#findPart(state));
    const { known, parts } = this.#vocabulary;
    return known.get(key) ?? remembered(parts, key, () => this.#findPart(state));
  }

  #knownPart(state: number): MaskPart | undefined {
    const key = this.#shapeKey(state);
    if (key === undefined) return this.#parts.get(state);
    return this.#vocabulary.known.get(key) ?? this.#vocabulary.parts.get(key);
  }

  #shapeKey(state: number): string | undefined {
    const { shapes, shapeOf, shapeState } = this.#tables;
    const shape = shapes[shapeOf[state]!];
    return shape === undefined ? undefined : `${shapeState[state]} ${shape}`;
  }

  #findPart(state: number): MaskPart {
    const flat = this.#flatOf(state);
    return flat ? this.#flatPart(flat, state) : this.#plainPart(state);
  }

  #plainPart(state: number): MaskPart {
    const { bytes, depths, ends, tokenStart, tokens } = this.#vocabulary.data;
    const bits = new Uint32Array(this.#vocabulary.words);
    const exits: number[] = [];
    const states = [this.#states.single(state, this.#states.bottom)];
    for (let node = 1; node < bytes.length; ) {
      const depth = depths[node]!;
      const next = this.#states.step(states[depth - 1]!, bytes[node]!);
      if (next === null) {
        node = ends[node]!;
        continue;
      }
      states[depth] = next;
      for (let i = tokenStart[node]!; i < tokenStart[node + 1]!; i++) setBit(bits, tokens[i]!);
      if (next.mayEnd && ends[node]! > node + 1) exits.push(node);
      node++;
    }
    this.#look(bytes.length);
    const exitAt = exits.length > FEW_EXITS ? new Uint16Array(bytes.length) : undefined;
    if (exitAt) for (const exit of exits) exitAt[exit] = 1;
    return { tokens: bits, exits: Int32Array.from(exits), exitAt, exitCounts: undefined, byCount: undefined };
  }

  readonly #flats = new Map<number, Flat | undefined>();

  /** The rule of `state` as a table; undefined where it has calls or choices, or is large. Counted rules have neither. */
  #flatOf(state: number): Flat | undefined {
    const { shapeOf, shapeState, counted, countedStart } = this.#tables;
    const rule = counted[state]!;
    const first = state - shapeState[state]!;
    if (!this.#flats.has(shapeOf[state]!)) {
      this.#flats.set(
        shapeOf[state]!,
        flatten(this.#tables, first, rule >= 0 ? countedStart[rule] : undefined),
      );
    }
    return this.#flats.get(shapeOf[state]!);
  }

  /** A state, and in a counted rule a count, are all there is to follow. */
  #flatPart({ first, next, final, isCounted }: Flat, state: number): MaskPart {
    const { bytes, depths, ends, tokenStart, tokens } = this.#vocabulary.data;
    const bits = new Uint32Array(this.#vocabulary.words);
    const exits: number[] = [];
    const exitCounts: number[] = [];
    /** Tokens by what they begin, in a counted rule. */
    const counts = isCounted ? new Uint16Array(tokens.length) : undefined;
    // By depth, which is 16 bits.
    const states = new Int32Array(2 ** 16);
    const begun = new Int32Array(2 ** 16);
    states[0] = state - first;
    for (let node = 1; node < bytes.length; ) {
      const depth = depths[node]!;
      const from = states[depth - 1]!;
      const to = next[from * 256 + bytes[node]!]!;
      if (to < 0) {
        node = ends[node]!;
        continue;
      }
      states[depth] = to;
      const count = isCounted && from === 0 ? begun[depth - 1]! + 1 : begun[depth - 1]!;
      begun[depth] = count;
      for (let i = tokenStart[node]!; i < tokenStart[node + 1]!; i++) {
        setBit(bits, tokens[i]!);
        if (counts) counts[i] = count;
      }
      if (final[to]! > 0 && ends[node]! > node + 1) {
        exits.push(node);
        exitCounts.push(count);
      }
      node++;
    }
    const exitAt = exits.length > FEW_EXITS ? new Uint16Array(bytes.length) : undefined;
    if (exitAt) for (let i = 0; i < exits.length; i++) exitAt[exits[i]!] = exitCounts[i]! + 1;
    return {
      tokens: bits,
      exits: Int32Array.from(exits),
      exitAt,
      exitCounts: counts && Uint16Array.from(exitCounts),
      byCount: counts && sortedByCount(tokens, counts),
    };
  }
}

/** `counts` by place in `tokens`; 0: not allowed, or allowed whatever the count is. */
function sortedByCount(tokens: Int32Array, counts: Uint16Array): MaskPart['byCount'] {
  let most = 0;
  for (const count of counts) most = Math.max(most, count);
  const next = new Int32Array(most + 2);
  for (const count of counts) next[count + 1]!++;
  // Those of 0 are left out.
  next[0] = 0;
  next[1] = 0;
  for (let count = 1; count <= most; count++) next[count + 1]! += next[count]!;
  const length = next[most + 1]!;
  const sorted = { tokens: new Int32Array(length), counts: new Uint16Array(length) };
  for (let i = 0; i < counts.length; i++) {
    const count = counts[i]!;
    if (count === 0) continue;
    const at = next[count]!++;
    sorted.tokens[at] = tokens[i]!;
    sorted.counts[at] = count;
  }
  return sorted;
}

/** A rule as a table: state times 256 plus byte, -1 where nothing follows. States from `first` on; the counted begin again in state 0. */
interface Flat {
  readonly first: number;
  readonly next: Int16Array;
  readonly final: Uint8Array;
  readonly isCounted: boolean;
}

function flatten(tables: CompiledGrammar, first: number, countedStart: number | undefined): Flat | undefined {
  const { edgeStart, edgeLow, edgeHigh, edgeTo, callStart, shapeOf, final } = tables;
  let end = first;
  while (shapeOf[end] === shapeOf[first]) end++;
  if (end - first > MOST_FLAT_STATES || callStart[first] !== callStart[end]) return undefined;
  const next = new Int16Array((end - first) * 256).fill(-1);
  for (let state = first; state < end; state++) {
    for (let edge = edgeStart[state]!; edge < edgeStart[state + 1]!; edge++) {
      for (let byte = edgeLow[edge]!; byte <= edgeHigh[edge]!; byte++) {
        const at = (state - first) * 256 + byte;
        if (next[at] !== -1) return undefined;
        next[at] = edgeTo[edge]! - first;
      }
    }
  }
  return { first, next, final: final.slice(first, end), isCounted: countedStart !== undefined };
}

function addTokens({ tokens, byCount }: MaskPart, most: number, bits: Uint32Array): void {
  if (!byCount || most >= (byCount.counts.at(-1) ?? 0)) {
    for (let i = 0; i < bits.length; i++) bits[i]! |= tokens[i]!;
    return;
  }
  const { tokens: sorted, counts } = byCount;
  const allowed = tokens.slice();
  for (let i = sorted.length - 1; i >= 0 && counts[i]! > most; i--) {
    allowed[sorted[i]! >>> 5]! &= ~(1 << (sorted[i]! & 31));
  }
  for (let i = 0; i < bits.length; i++) bits[i]! |= allowed[i]!;
}

function setBit(bits: Uint32Array, token: number): void {
  bits[token >>> 5]! |= 1 << (token & 31);
}

/** The tokens of `bits`; undefined where they are many. */
function listOf(bits: Uint32Array): Int32Array | undefined {
  const tokens: number[] = [];
  for (let i = 0; i < bits.length; i++) {
    for (let word = bits[i]!; word !== 0; word = (word & (word - 1)) >>> 0) {
      if (tokens.length === SHORT_LIST) return undefined;
      tokens.push(i * 32 + 31 - Math.clz32(word & -word));
    }
  }
  return Int32Array.from(tokens);
}

function remembered<K>(parts: Map<K, MaskPart>, key: K, find: () => MaskPart): MaskPart {
  let part = parts.get(key);
  if (!part) {
    if (parts.size >= MOST_PARTS) parts.clear();
    part = find();
    parts.set(key, part);
  }
  return part;
}
