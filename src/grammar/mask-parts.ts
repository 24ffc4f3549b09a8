/** Parts of masks: what a state of a rule allows without a look at what is below the rule, found by a walk over the vocabulary. */
import { type CompiledGrammar, MOST_DEPTH } from './compile.ts';
import type { GrammarState, GrammarStates } from './states.ts';
import { type MaskPart, setBit, type Vocabulary } from './vocabulary.ts';

/** Nodes of the vocabulary looked at before a walk counts as long. */
const SHORT_WALK = 6000;
/** Parts of counted rules, and of those without calls, that allow no more tokens are kept as a list. */
const FEW_TOKENS = 1024;
/** Places where a rule is left, above which they are looked up by the byte that comes next. */
const FEW_EXITS = 2048;
/** A table of a rule takes half a kilobyte a state. */
const MOST_FLAT_STATES = 1024;
/** Parts kept per grammar, and of those that all grammars share. */
const MOST_PARTS = 48;
/** Nodes looked at that cost what following a thread does. */
const NODES_A_STEP = 16;

/** Parts of a grammar that have been found before (parts-ahead.ts). Plain data: crosses threads as it is. */
export interface PartsAhead {
  /** By state of the tables; -1: none. */
  readonly rows: Int32Array;
  /** Row r allows `tokens[tokenStart[r]]` to `tokens[tokenStart[r + 1] - 1]`; exits likewise: what a `MaskPart` has. */
  readonly tokenStart: Int32Array;
  readonly tokens: Int32Array;
  readonly exitStart: Int32Array;
  readonly exits: Int32Array;
  /** Those of other states that are long, or of counted rules. */
  readonly large: readonly (readonly [state: number, part: MaskPart])[];
  /** Of the deepest row. */
  readonly depth: number;
}

/** What a walk has come to. */
interface Found {
  readonly tokens: number[];
  /** Nodes within tokens where the text, or the rule of a state alone, may end. */
  readonly exits: number[];
  /** As in a `MaskPart`. */
  depth: number;
  /** Nodes. */
  looked: number;
}

export class MaskParts {
  readonly #tables: CompiledGrammar;
  readonly #states: GrammarStates;
  readonly #vocabulary: Vocabulary;
  readonly #ahead: PartsAhead | undefined;
  readonly #large: ReadonlyMap<number, MaskPart>;
  readonly #own = new Map<number, MaskPart>();
  #ownBytes = 0;
  #flatBytes = 0;
  /** Of states of the tables: whether their part is worth finding. */
  readonly #wide = new Map<number, boolean>();
  /** By the shape of the rule: its table, if it can be one. */
  readonly #flats = new Map<number, Flat | undefined>();

  constructor(
    tables: CompiledGrammar,
    states: GrammarStates,
    vocabulary: Vocabulary,
    ahead: PartsAhead | undefined,
  ) {
    this.#tables = tables;
    this.#states = states;
    this.#vocabulary = vocabulary;
    this.#ahead = ahead;
    this.#large = new Map(ahead?.large);
  }

  /** Of a state that `depth` calls are open below; undefined where a walk from there is short, for all that is known. */
  ready(state: number, depth: number): MaskPart | undefined {
    const ahead = this.#ahead;
    if (ahead) {
      const row = ahead.rows[state]!;
      const part = row >= 0 ? partOfRow(ahead, row) : this.#large.get(state);
      if (part && serves(part, depth)) return part;
    }
    return this.#isWide(state) ? this.wide(state, depth) : undefined;
  }

  /** Of a counted rule it serves for all counts, and what is known is there. */
  #isWide(state: number): boolean {
    let isWide = this.#wide.get(state);
    if (isWide === undefined) {
      isWide = this.#tables.counted[state]! >= 0 || this.#isKnown(state);
      this.#wide.set(state, isWide);
    }
    return isWide;
  }

  #isKnown(state: number): boolean {
    const key = this.shapeKey(state);
    return key !== undefined && (this.#vocabulary.known.has(key) || this.#vocabulary.parts.has(key));
  }

  /** Of a state from which a walk is long; undefined where fewer calls may follow than the part has. */
  wide(state: number, depth: number): MaskPart | undefined {
    const part = this.#widePart(state);
    return serves(part, depth) ? part : undefined;
  }

  #widePart(state: number): MaskPart {
    this.#wide.set(state, true);
    const key = this.shapeKey(state);
    if (key === undefined) return this.#ownPart(state);
    const { known, parts } = this.#vocabulary;
    return known.get(key) ?? remembered(parts, key, () => this.#find(state));
  }

  /** Of parts and tables that this grammar alone has. */
  get bytes(): number {
    return this.#ownBytes + this.#flatBytes;
  }

  #ownPart(state: number): MaskPart {
    const known = this.#own.get(state);
    if (known) return known;
    const part = remembered(this.#own, state, () => this.#find(state));
    this.#ownBytes = [...this.#own.values()].reduce((sum, one) => sum + bytesOf(one), 0);
    return part;
  }

  /** What `ready` should have beforehand; undefined where each grammar has it. */
  first(state: number): MaskPart | undefined {
    const key = this.shapeKey(state);
    if (key !== undefined && this.#vocabulary.known.has(key)) return undefined;
    if (this.#isWide(state)) return this.#widePart(state);
    const found = this.shortWalk(this.#alone(state));
    return found ? plainPart(Int32Array.from(found.tokens), found) : this.#widePart(state);
  }

  /** Equal where a part of one grammar is one of another; undefined where there may be none. */
  shapeKey(state: number): string | undefined {
    const { shapes, shapeOf, shapeState } = this.#tables;
    const shape = shapes[shapeOf[state]!];
    return shape === undefined ? undefined : `${shapeState[state]} ${shape}`;
  }

  #alone(state: number): GrammarState {
    return this.#states.some([state], [this.#states.bottom]);
  }

  /** Every token that may follow `state`; undefined where finding them is long. */
  shortWalk(state: GrammarState): Found | undefined {
    return this.#walk(state, SHORT_WALK);
  }

  /** The same, however long. */
  longWalk(state: GrammarState): Found {
    const found = this.#walk(state, Number.POSITIVE_INFINITY)!;
    this.#states.spend(found.looked / NODES_A_STEP);
    return found;
  }

  #walk(state: GrammarState, most: number): Found | undefined {
    const { bytes, depths, ends, tokenStart, tokens } = this.#vocabulary.data;
    const found: Found = { tokens: [], exits: [], depth: 0, looked: 0 };
    const states = [state];
    for (let node = 1; node < bytes.length; ) {
      if (++found.looked > most) return undefined;
      const depth = depths[node]!;
      const next = this.#states.step(states[depth - 1]!, bytes[node]!);
      if (next === null) {
        node = ends[node]!;
        continue;
      }
      states[depth] = next;
      if (next.deepest > found.depth) found.depth = next.deepest;
      for (let i = tokenStart[node]!; i < tokenStart[node + 1]!; i++) found.tokens.push(tokens[i]!);
      if (next.mayEnd && ends[node]! > node + 1) found.exits.push(node);
      node++;
    }
    return found;
  }

  #find(state: number): MaskPart {
    const flat = this.#flatOf(state);
    if (flat) return this.#flatPart(flat, state);
    const { bytes } = this.#vocabulary.data;
    const found = this.#walk(this.#alone(state), Number.POSITIVE_INFINITY)!;
    this.#states.spend(bytes.length / NODES_A_STEP);
    const bits = new Uint32Array(this.#vocabulary.words);
    for (const token of found.tokens) setBit(bits, token);
    return plainPart(bits, found, bytes.length);
  }

  /** The rule of `state` as a table; undefined where it has calls or choices, or is large. Counted rules have neither. */
  #flatOf(state: number): Flat | undefined {
    const { shapeOf, shapeState, counted, countedStart } = this.#tables;
    const rule = counted[state]!;
    const first = state - shapeState[state]!;
    if (!this.#flats.has(shapeOf[state]!)) {
      const flat = flatten(this.#tables, first, rule >= 0 ? countedStart[rule] : undefined);
      this.#flats.set(shapeOf[state]!, flat);
      this.#flatBytes += flat?.next.byteLength ?? 0;
    }
    return this.#flats.get(shapeOf[state]!);
  }

  /** A state, and in a counted rule a count, are all there is to follow. */
  #flatPart({ first, next, final, isCounted }: Flat, state: number): MaskPart {
    const { bytes, depths, ends, tokenStart, tokens } = this.#vocabulary.data;
    const bits = new Uint32Array(this.#vocabulary.words);
    const found: [token: number, count: number][] = [];
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
        if (found.length <= FEW_TOKENS) found.push([tokens[i]!, count]);
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
    const left = {
      exits: Int32Array.from(exits),
      exitAt,
      exitCounts: counts && Uint16Array.from(exitCounts),
      depth: 0,
    };
    if (found.length > FEW_TOKENS) {
      return { ...left, tokens: bits, byCount: counts && sortedByCount(tokens, counts) };
    }
    found.sort(([, a], [, b]) => a - b);
    const few = Int32Array.from(found, ([token]) => token);
    const byCount = isCounted
      ? { tokens: few, counts: Uint16Array.from(found, ([, count]) => count) }
      : undefined;
    return { ...left, tokens: few, byCount };
  }
}

function bytesOf({ tokens, exits, exitAt, exitCounts, byCount }: MaskPart): number {
  const arrays = [tokens, exits, exitAt, exitCounts, byCount?.tokens, byCount?.counts];
  return arrays.reduce((sum, one) => sum + (one?.byteLength ?? 0), 0);
}

/** Without a copy. */
function partOfRow({ tokenStart, tokens, exitStart, exits, depth }: PartsAhead, row: number): MaskPart {
  return {
    tokens: tokens.subarray(tokenStart[row], tokenStart[row + 1]),
    exits: exits.subarray(exitStart[row], exitStart[row + 1]),
    exitAt: undefined,
    exitCounts: undefined,
    byCount: undefined,
    depth,
  };
}

function serves(part: MaskPart, depth: number): boolean {
  return depth + part.depth <= MOST_DEPTH;
}

/** `nodes`: of the vocabulary, where exits are to be looked up by node once they are many. */
function plainPart(tokens: MaskPart['tokens'], { exits, depth }: Found, nodes?: number): MaskPart {
  const exitAt = nodes !== undefined && exits.length > FEW_EXITS ? new Uint16Array(nodes) : undefined;
  if (exitAt) for (const exit of exits) exitAt[exit] = 1;
  return { tokens, exits: Int32Array.from(exits), exitAt, exitCounts: undefined, byCount: undefined, depth };
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

function remembered<K>(parts: Map<K, MaskPart>, key: K, find: () => MaskPart): MaskPart {
  let part = parts.get(key);
  if (!part) {
    if (parts.size >= MOST_PARTS) parts.clear();
    part = find();
    parts.set(key, part);
  }
  return part;
}
