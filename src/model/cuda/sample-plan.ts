/**
 * What is done to rows of logits beyond a plain draw, as the kernels read it: one block of int32 that goes to the GPU in one copy. Pure.
 *
 *   shapes[r][12] draws[r][5] wanted[w][3] | edits, masks, tokens to count, tokens to report...
 *
 * r: rows that are banned, biased or penalized before they are drawn from; w: rows whose log-probabilities are reported.
 */
import type { SampleSpec, TokenHistory } from '../../scheduler/types.ts';
import type { Shaping } from '../shaping.ts';
import { DRAW_WORDS, writeDraw } from './step-plan.ts';

/** struct Shape, struct Wanted and struct Report of kernels/model/sample.cu. */
const SHAPE_WORDS = 12;
const WANTED_WORDS = 3;
export const MOST_REPORTED = 20;
export const REPORT_WORDS = 2 + 2 * MOST_REPORTED;

export interface SamplePlanLimits {
  /** Rows that are shaped, and rows that are reported, at a time. */
  readonly shapes: number;
  readonly reports: number;
  readonly vocab: number;
  /** Most tokens of a sequence. */
  readonly maxLength: number;
}

/** Words that a row whose every token is edited takes, and masks and a kilobyte of edits for all others. */
export function samplePlanCapacity(limits: SamplePlanLimits): number {
  const { shapes, vocab, maxLength } = limits;
  return offsetsOf(limits).data + maxLength + 2 * vocab + shapes * (maskWords(vocab) + 256);
}

function offsetsOf({ shapes, reports }: SamplePlanLimits) {
  const draws = SHAPE_WORDS * shapes;
  const wanted = draws + DRAW_WORDS * shapes;
  return { shapes: 0, draws, wanted, data: wanted + WANTED_WORDS * reports };
}

function maskWords(vocab: number): number {
  return Math.ceil(vocab / 32);
}

export class SamplePlan {
  /** Where each part begins, in words. */
  readonly at: ReturnType<typeof offsetsOf>;
  readonly #limits: SamplePlanLimits;
  readonly #words: Int32Array;
  readonly #floats: Float32Array;
  readonly #slots: CountSlots;
  #shapes = 0;
  #reports = 0;
  #end: number;

  constructor(words: Int32Array, limits: SamplePlanLimits, slots: CountSlots) {
    this.at = offsetsOf(limits);
    this.#limits = limits;
    this.#words = words;
    this.#floats = new Float32Array(words.buffer, words.byteOffset, words.length);
    this.#slots = slots;
    this.#end = this.at.data;
  }

  get shapes(): number {
    return this.#shapes;
  }

  get reports(): number {
    return this.#reports;
  }

  /** Words written, from the first on. */
  get words(): number {
    return this.#end;
  }

  clear(): void {
    this.#shapes = 0;
    this.#reports = 0;
    this.#end = this.at.data;
  }

  /** `row` of the logits is shaped and drawn from; its place among such rows. Undefined where the plan is full, which an empty one never is. */
  shape(row: number, { mask, edits, penalties }: Shaping, spec: SampleSpec): number | undefined {
    const { shapes, vocab } = this.#limits;
    const place = this.#shapes;
    const room = this.#words.length - this.#end;
    const needed = (mask ? maskWords(vocab) : 0) + 2 * edits.size + (penalties?.history.length ?? 0);
    if (place === shapes || needed > room) return undefined;
    this.#shapes++;
    const words = this.#words;
    const at = this.at.shapes + SHAPE_WORDS * place;
    words.fill(0, at, at + SHAPE_WORDS);
    words[at] = row;
    words[at + 1] = mask ? this.#mask(mask) : -1;
    words[at + 2] = this.#end - this.at.data;
    words[at + 3] = edits.size;
    for (const [token, bias] of edits) {
      words[this.#end++] = token;
      this.#floats[this.#end++] = bias;
    }
    words[at + 4] = -1;
    if (penalties) {
      const { history, repetition, frequency, presence } = penalties;
      const { slot, fresh, from } = this.#slots.take(history);
      const tokens = history.tokens(from, history.length);
      const prompt = Math.max(0, history.promptLength - from);
      words.set([slot, fresh ? 1 : 0, this.#data(tokens), prompt, tokens.length - prompt], at + 4);
      this.#floats.set([repetition, frequency, presence], at + 9);
    }
    const draw = this.at.draws + DRAW_WORDS * place;
    words.fill(0, draw, draw + DRAW_WORDS);
    writeDraw(words, this.#floats, draw, spec);
    return place;
  }

  /** What `row` of the logits says of the token at index `token`, and of the `count` likeliest; its place among reports. */
  report(row: number, token: number, count: number): number {
    const place = this.#reports++;
    this.#words.set([row, token, Math.min(count, MOST_REPORTED)], this.at.wanted + WANTED_WORDS * place);
    return place;
  }

  /** Puts `tokens` where nothing is shaped; their word in the plan. */
  tokens(tokens: Int32Array): number {
    return this.at.data + this.#data(tokens);
  }

  #data(values: Int32Array): number {
    const at = this.#end;
    this.#words.set(values, at);
    this.#end += values.length;
    return at - this.at.data;
  }

  /** Short ones ban the rest. */
  #mask(mask: Uint32Array): number {
    const at = this.#end;
    const count = maskWords(this.#limits.vocab);
    this.#words.fill(0, at, at + count);
    this.#words.set(mask.subarray(0, count), at);
    this.#end += count;
    return at - this.at.data;
  }
}

interface Slot {
  readonly index: number;
  counted: number;
  used: number;
}

/** What must be counted before a slot holds a sequence's counts. */
interface Counting {
  readonly slot: number;
  /** It holds another sequence's counts. */
  readonly fresh: boolean;
  /** The first token that is not counted. */
  readonly from: number;
}

/** Which sequence's tokens each slot of counts on the GPU holds, and how many of them. The least recently used goes first. */
export class CountSlots {
  /** By slot; all that is left of a sequence that has ended. */
  readonly #slots: (Slot | undefined)[];
  /** Weak: a sequence that has ended is not kept alive. */
  readonly #byHistory = new WeakMap<TokenHistory, Slot>();
  #clock = 0;

  constructor(count: number) {
    this.#slots = new Array<Slot | undefined>(count).fill(undefined);
  }

  /** What `history` still needs, which counts as done from now on. Only as many sequences as there are slots keep theirs. */
  take(history: TokenHistory): Counting {
    this.#clock++;
    const known = this.#byHistory.get(history);
    if (known && this.#slots[known.index] === known && known.counted <= history.length) {
      const from = known.counted;
      known.counted = history.length;
      known.used = this.#clock;
      return { slot: known.index, fresh: false, from };
    }
    const used = this.#slots.map((slot) => slot?.used ?? 0);
    const index = used.indexOf(Math.min(...used));
    const slot = { index, counted: history.length, used: this.#clock };
    this.#slots[index] = slot;
    this.#byHistory.set(history, slot);
    return { slot: index, fresh: true, from: 0 };
  }

  /** A step failed: the slots' contents are no longer known. */
  forget(): void {
    this.#slots.fill(undefined);
  }
}
