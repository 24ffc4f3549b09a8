/**
 * `uniqueItems`: no automaton remembers which items an array has had, so they are remembered beside it. Their texts are: rules for such items
 * write each value in one way, blanks left out. An item may be begun like another one as long as it can still be gone on with differently.
 */
import { PdError } from '../errors.ts';
import type { GrammarState, GrammarStates } from './states.ts';
import { CROSSES, type VocabularyData } from './vocabulary.ts';

const [COMMA, QUOTE, BACKSLASH] = [0x2c, 0x22, 0x5c];
const [OPEN_ARRAY, CLOSE_ARRAY, OPEN_OBJECT, CLOSE_OBJECT] = [0x5b, 0x5d, 0x7b, 0x7d];
/** Texts of items looked at that cost what following a thread does. */
const TEXTS_A_STEP = 8;

/** Where a byte is: between the tokens of JSON, in a string, behind a backslash. */
type Within = 'tokens' | 'string' | 'escape';

interface OpenArray {
  readonly outer: OpenArray | undefined;
  /** Arrays and objects open around its items, since the outermost of these. */
  readonly depth: number;
  readonly seen: readonly string[];
  /** Of the item that is read: its text so far, and those of `seen` that begin with it. */
  readonly text: string;
  readonly alike: readonly string[];
}

/** A state, and the arrays open there whose items differ. Immutable. */
export class UniquePlace {
  readonly state: GrammarState;
  readonly array: OpenArray | undefined;
  readonly depth: number;
  readonly within: Within;

  constructor(state: GrammarState, array?: OpenArray, depth = 0, within: Within = 'tokens') {
    this.state = state;
    this.array = array;
    this.depth = depth;
    this.within = within;
  }

  get mayEnd(): boolean {
    return this.state.mayEnd;
  }

  get isOver(): boolean {
    return this.state.isOver;
  }
}

export class UniqueItems {
  readonly #states: GrammarStates;
  /** Of rules of such arrays. */
  readonly #starts: ReadonlySet<number>;

  constructor(states: GrammarStates) {
    this.#states = states;
    this.#starts = new Set(states.tables.uniqueStarts);
  }

  /** Whether the grammar has such arrays at all. */
  get isNeeded(): boolean {
    return this.#starts.size > 0;
  }

  /** Null where no text of the grammar goes on with `byte`, or all that do repeat an item. */
  step({ state, array, depth, within }: UniquePlace, byte: number): UniquePlace | null {
    const next = this.#states.step(state, byte);
    if (next === null) return null;
    const opens = within === 'tokens' && byte === OPEN_ARRAY && this.#opensUnique(state);
    if (!array && !opens) return new UniquePlace(next);
    if (within === 'tokens' && isBlank(byte)) return new UniquePlace(next, array, depth, within);
    const after = depth + depthOf(byte, within);
    let open = array && this.#read(array, byte, depth, within);
    if (open === null) return null;
    if (opens) open = { outer: open, depth: after, seen: [], text: '', alike: [] };
    const place = new UniquePlace(next, open, after, withinAfter(byte, within));
    for (let one = open; one; one = one.outer) {
      if (!this.#canDiffer(place, one.depth, one.text.length, one.alike)) return null;
    }
    return place;
  }

  /** Takes tokens that repeat an item out of `mask`, which is of `place.state`. Throws REQUEST_INVALID where none is left. */
  forbid(place: UniquePlace, vocabulary: VocabularyData, mask: Uint32Array): void {
    const { bytes, ends, tokenStart, tokens, crosses } = vocabulary;
    const open = [{ node: 0, at: place }];
    for (let top = open.pop(); top; top = open.pop()) {
      const { node, at } = top;
      if (!canRepeat(at, crosses[node]!)) continue;
      for (let child = node + 1; child < ends[node]!; child = ends[child]!) {
        const next = this.step(at, bytes[child]!);
        if (next) open.push({ node: child, at: next });
        else if (this.#states.step(at.state, bytes[child]!) !== null) {
          for (let i = tokenStart[child]!; i < tokenStart[ends[child]!]!; i++) {
            mask[tokens[i]! >>> 5]! &= ~(1 << (tokens[i]! & 31));
          }
        }
      }
    }
    if (place.array && mask.every((word) => word === 0)) {
      throw new PdError(
        'REQUEST_INVALID',
        'the JSON schema leaves no more items that differ ("uniqueItems")',
      );
    }
  }

  #opensUnique({ threads }: GrammarState): boolean {
    return threads.some((thread) => this.#starts.has(thread % this.#states.tables.numStates));
  }

  /** The arrays behind `byte`, which is no blank; null where it ends an item that has been there. */
  #read(array: OpenArray, byte: number, depth: number, within: Within): OpenArray | undefined | null {
    const { seen, text, alike, outer } = array;
    const above = outer && this.#read(outer, byte, depth, within);
    if (above === null) return null;
    const isEnd = endsItem(byte, depth, within, array.depth);
    if (isEnd && alike.includes(text)) return null;
    if (isEnd && byte === CLOSE_ARRAY) return above;
    this.#states.spend((isEnd ? seen.length : alike.length) / TEXTS_A_STEP);
    if (isEnd) {
      const all = [...seen, text];
      return { ...array, outer: above, seen: all, text: '', alike: all };
    }
    const still = alike.filter((one) => one.charCodeAt(text.length) === byte);
    return { ...array, outer: above, text: text + String.fromCharCode(byte), alike: still };
  }

  /** Whether an item of which `length` bytes have been read can become another one than each of `alike`, which begin with them. */
  #canDiffer(place: UniquePlace, ofItems: number, length: number, alike: readonly string[]): boolean {
    const { classBytes } = this.#states.tables;
    let at = place;
    let left = alike;
    for (let offset = length; ; offset++) {
      if (left.length === 0) return true;
      this.#states.spend(1 + left.length / TEXTS_A_STEP);
      const byNext = new Map<number, string[]>();
      for (const one of left) {
        const byte = one.charCodeAt(offset);
        const others = byNext.get(byte);
        if (others) others.push(one);
        else byNext.set(byte, [one]);
      }
      const { state, depth, within } = at;
      for (let ofClass = 0; ofClass < classBytes.length; ofClass++) {
        if (this.#states.step(state, classBytes[ofClass]!) === null) continue;
        for (let byte = classBytes[ofClass]!; byte < (classBytes[ofClass + 1] ?? 256); byte++) {
          if (within === 'tokens' && isBlank(byte)) continue;
          const differs = endsItem(byte, depth, within, ofItems)
            ? offset > 0 && !byNext.has(Number.NaN)
            : !byNext.has(byte);
          if (differs) return true;
        }
      }
      // The same way as one of them, and from there on another.
      const ways = [...byNext].flatMap(([byte, ones]) => {
        const next = Number.isNaN(byte) ? null : this.#states.step(state, byte);
        if (next === null) return [];
        const behind = depth + depthOf(byte, within);
        return [{ ones, to: new UniquePlace(next, undefined, behind, withinAfter(byte, within)) }];
      });
      const last = ways.pop();
      if (ways.some(({ to, ones }) => this.#canDiffer(to, ofItems, offset + 1, ones))) return true;
      if (!last) return false;
      at = last.to;
      left = last.ones;
    }
  }
}

/** Whether a token on whose way `place` is could repeat an item further on. */
function canRepeat({ array, within }: UniquePlace, crosses: number): boolean {
  for (let one = array; one; one = one.outer) if (one.alike.length > 0) return true;
  if (!array) return (crosses & CROSSES.intoItem) !== 0;
  return (crosses & (within === 'tokens' ? CROSSES.item : CROSSES.stringAndItem)) !== 0;
}

function endsItem(byte: number, depth: number, within: Within, ofItems: number): boolean {
  return within === 'tokens' && depth === ofItems && (byte === COMMA || byte === CLOSE_ARRAY);
}

function depthOf(byte: number, within: Within): number {
  if (within !== 'tokens') return 0;
  if (byte === OPEN_ARRAY || byte === OPEN_OBJECT) return 1;
  return byte === CLOSE_ARRAY || byte === CLOSE_OBJECT ? -1 : 0;
}

function withinAfter(byte: number, within: Within): Within {
  switch (within) {
    case 'tokens':
      return byte === QUOTE ? 'string' : 'tokens';
    case 'string':
      if (byte === QUOTE) return 'tokens';
      return byte === BACKSLASH ? 'escape' : 'string';
    case 'escape':
      return 'string';
  }
}

function isBlank(byte: number): boolean {
  return byte === 0x20 || byte === 0x0a || byte === 0x0d || byte === 0x09;
}
