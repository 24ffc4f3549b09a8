/**
 * Where a text stands in a grammar: a set of threads, each a state of a rule over the calls that are open below it. States are immutable and
 * interned, and remember where each byte leads, so what has been read once is read again by one look-up: forking is keeping a reference.
 */
import { PdError } from '../errors.ts';
import { type CompiledGrammar, MOST_DEPTH } from './compile.ts';

/** Open calls, innermost first: all stacks of a thread at once. Equal sets are one object. */
export interface StackSet {
  readonly id: number;
  /** By where to go on, each once, in order. */
  readonly frames: readonly { readonly back: number; readonly below: StackSet }[];
  /** No call is open in one of them: where its rule ends, the text may. */
  readonly bottom: boolean;
  /** Of the shallowest. */
  readonly depth: number;
  /** What is reached where the innermost rule ends, once asked for. */
  popped: GrammarState | undefined;
}

export class GrammarState {
  /** A state of the tables plus `numStates` times what a counted rule has counted; sorted. */
  readonly threads: readonly number[];
  /** Of each thread. */
  readonly stacks: readonly StackSet[];
  /** The text may end here. */
  readonly mayEnd: boolean;
  /** Calls that had to be possible at once on the way here from the state before, at most: where fewer are left, other threads are reached. */
  deepest = 0;
  /** By class of byte; null: no text goes on so. */
  next: (GrammarState | null | undefined)[];
  /** Which tokens may follow: their ids, or a bit each. Kept by masks.ts. */
  mask: Int32Array | Uint32Array | undefined;

  constructor(threads: readonly number[], stacks: readonly StackSet[], mayEnd: boolean, numClasses: number) {
    this.threads = threads;
    this.stacks = stacks;
    this.mayEnd = mayEnd;
    this.next = new Array(numClasses).fill(undefined);
  }

  /** Nothing can follow. */
  get isOver(): boolean {
    return this.threads.length === 0;
  }
}

/** States and stacks that are remembered, and the bytes of them, their masks included; beyond, all is forgotten and found anew. */
const MOST_REMEMBERED = 20_000;
const MOST_BYTES = 64 * 2 ** 20;
/** What a state or a stack takes beside what is counted of it, its entry in a map included. */
const BYTES_EACH = 300;
/** Of what an array holds, about; of a key, a letter. */
const BYTES_AN_ELEMENT = 8;
const BYTES_A_FRAME = 40;
const MOST_THREADS = 4096;
/**
 * Steps that a grammar may save up, and what each mask and each token add to them: a thread followed is one, half a microsecond or so. Masks are
 * found on the core thread, where everybody's streams wait for them. What is common takes a few thousand steps now and then, and hardly
 * any in between.
 */
const MOST_CREDIT = 200_000;
const CREDIT_EACH = 2_000;

export class GrammarStates {
  readonly tables: CompiledGrammar;
  readonly bottom: StackSet = { id: 0, frames: [], bottom: true, depth: 0, popped: undefined };
  #states = new Map<string, GrammarState>();
  #stacks = new Map<string, StackSet>();
  #nextStack = 1;
  #credit = MOST_CREDIT;
  #bytes = 0;
  #start: GrammarState | undefined;

  constructor(tables: CompiledGrammar) {
    this.tables = tables;
  }

  get start(): GrammarState {
    if (!this.#start) {
      this.#reach.clear();
      this.#reach.add(this.tables.start, this.bottom);
      this.#start = this.#closed();
    }
    return this.#start;
  }

  /** Of what is remembered, about. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Remembers the mask of a state. */
  keepMask(state: GrammarState, mask: Int32Array | Uint32Array): void {
    state.mask = mask;
    this.#bytes += mask.byteLength;
  }

  /** To be called before each mask and token. */
  begin(): void {
    this.#credit = Math.min(MOST_CREDIT, this.#credit + CREDIT_EACH);
    if (this.#states.size + this.#stacks.size <= MOST_REMEMBERED && this.#bytes <= MOST_BYTES) return;
    this.#bytes = 0;
    for (const state of this.#states.values()) {
      state.next.fill(undefined);
      state.mask = undefined;
    }
    for (const stack of this.#stacks.values()) stack.popped = undefined;
    this.bottom.popped = undefined;
    this.#states = new Map();
    this.#stacks = new Map();
    this.#start = undefined;
  }

  /** Null where no text of the grammar goes on with `byte`. */
  step(state: GrammarState, byte: number): GrammarState | null {
    const ofClass = this.tables.classOf[byte]!;
    const known = state.next[ofClass];
    if (known !== undefined) return known;
    const found = this.#stepped(state, byte);
    const next = found?.isOver && !found.mayEnd ? null : found;
    state.next[ofClass] = next;
    return next;
  }

  /** A state of some threads alone, whose calls are not entered. */
  some(threads: readonly number[], stacks: readonly StackSet[]): GrammarState {
    return this.#interned(threads, stacks, false);
  }

  /** What goes on where the innermost rule over `stack` ends. */
  popped(stack: StackSet): GrammarState {
    if (!stack.popped) {
      this.#reach.clear();
      this.#reach.mayEnd = stack.bottom;
      for (const { back, below } of stack.frames) this.#reach.add(back, below);
      stack.popped = this.#closed();
    }
    return stack.popped;
  }

  #stepped({ threads, stacks }: GrammarState, byte: number): GrammarState | null {
    const { numStates, edgeStart, edgeLow, edgeHigh, edgeTo, height, counted } = this.tables;
    const reach = this.#reach;
    reach.clear();
    this.spend(threads.length);
    for (let i = 0; i < threads.length; i++) {
      const thread = threads[i]!;
      const state = thread % numStates;
      const stack = stacks[i]!;
      for (let edge = edgeStart[state]!; edge < edgeStart[state + 1]!; edge++) {
        if (byte < edgeLow[edge]! || byte > edgeHigh[edge]!) continue;
        const to = edgeTo[edge]!;
        if (counted[state]! >= 0) {
          reach.add(to + this.#count(state, Math.floor(thread / numStates)) * numStates, stack);
        } else if (this.#fits(height[to]! + stack.depth)) {
          reach.add(to, stack);
        }
      }
    }
    return reach.stacks.size === 0 ? null : this.#closed();
  }

  /** Whether so many calls may be open. */
  #fits(depth: number): boolean {
    if (depth > this.#reach.deepest) this.#reach.deepest = depth;
    return depth <= MOST_DEPTH;
  }

  /** What a counted rule has counted once it leaves `state`. */
  #count(state: number, before: number): number {
    const { counted, countedStart, countedMin, countedMax } = this.tables;
    const rule = counted[state]!;
    if (state !== countedStart[rule]) return before;
    // Without a limit nothing hangs on how many more than the least there are.
    return countedMax[rule]! >= 0 ? before + 1 : Math.min(before + 1, countedMin[rule]!);
  }

  /** What has been reached, and everything that is reached from there without a byte. */
  #closed(): GrammarState {
    const reach = this.#reach;
    for (let thread = reach.next(); thread !== undefined; thread = reach.next()) this.#follow(thread);
    const threads: number[] = [];
    for (const thread of reach.stacks.keys()) if (this.#reads(thread)) threads.push(thread);
    if (threads.length > 1) threads.sort((a, b) => a - b);
    const stacks = threads.map((thread) => reach.stacks.get(thread)!);
    const state = this.#interned(threads, stacks, reach.mayEnd);
    if (reach.deepest > state.deepest) state.deepest = reach.deepest;
    return state;
  }

  readonly #reach = new Reach((a, b) => this.#union(a, b));

  #follow(thread: number): void {
    const { numStates, callStart, callTarget, callReturn, final, height, counted } = this.tables;
    const state = thread % numStates;
    const stack = this.#reach.stacks.get(thread)!;
    this.spend(1 + stack.frames.length);
    const mayEnd =
      counted[state]! >= 0 ? this.#hasCounted(state, Math.floor(thread / numStates)) : final[state]! > 0;
    if (mayEnd) {
      this.#reach.mayEnd ||= stack.bottom;
      for (const { back, below } of stack.frames) this.#reach.add(back, below);
    }
    for (let call = callStart[state]!; call < callStart[state + 1]!; call++) {
      const target = callTarget[call]!;
      const back = callReturn[call]!;
      this.spend(1);
      // Where nothing is left to do after a call, it takes its caller's place: lists by recursion stay flat.
      const isLast = final[back] === 2;
      if (!isLast && !this.#fits(height[back]! + stack.depth)) continue;
      const depth = stack.depth + (isLast ? 0 : 1);
      if (!this.#fits(height[target]! + depth)) continue;
      this.#reach.add(target, isLast ? stack : this.#stackOf([{ back, below: stack }], false));
    }
  }

  #hasCounted(state: number, count: number): boolean {
    const { counted, countedStart, countedMin } = this.tables;
    const rule = counted[state]!;
    return state === countedStart[rule] && count >= countedMin[rule]!;
  }

  /** Whether a byte can follow in this thread itself. */
  #reads(thread: number): boolean {
    const { numStates, edgeStart, counted, countedStart, countedMax } = this.tables;
    const state = thread % numStates;
    if (edgeStart[state] === edgeStart[state + 1]) return false;
    const rule = counted[state]!;
    return rule < 0 || state !== countedStart[rule] || Math.floor(thread / numStates) !== countedMax[rule];
  }

  #interned(threads: readonly number[], stacks: readonly StackSet[], mayEnd: boolean): GrammarState {
    if (threads.length > MOST_THREADS) throw tooAmbiguous();
    this.spend(threads.length);
    let key = mayEnd ? '!' : '';
    for (let i = 0; i < threads.length; i++) key += `${threads[i]}:${stacks[i]!.id} `;
    let state = this.#states.get(key);
    if (!state) {
      state = new GrammarState(threads, stacks, mayEnd, this.tables.classBytes.length);
      this.#states.set(key, state);
      const elements = 2 * threads.length + state.next.length;
      this.#bytes += BYTES_EACH + key.length + BYTES_AN_ELEMENT * elements;
    }
    return state;
  }

  /** `frames` sorted. */
  #stackOf(frames: StackSet['frames'], bottom: boolean): StackSet {
    this.spend(frames.length);
    let key = bottom ? '!' : '';
    for (const { back, below } of frames) key += `${back}:${below.id} `;
    let stack = this.#stacks.get(key);
    if (!stack) {
      let depth = bottom ? 0 : Number.POSITIVE_INFINITY;
      for (const { below } of frames) depth = Math.min(depth, below.depth + 1);
      stack = { id: this.#nextStack++, frames, bottom, depth, popped: undefined };
      this.#stacks.set(key, stack);
      this.#bytes += BYTES_EACH + key.length + BYTES_A_FRAME * frames.length;
    }
    return stack;
  }

  /** As deep as calls are open, which is limited. */
  #union(a: StackSet, b: StackSet): StackSet {
    if (a === b) return a;
    const frames: { back: number; below: StackSet }[] = [];
    let [ofA, ofB] = [0, 0];
    while (ofA < a.frames.length || ofB < b.frames.length) {
      const [one, other] = [a.frames[ofA], b.frames[ofB]];
      this.spend(1);
      if (one && (!other || one.back < other.back)) {
        frames.push(one);
        ofA++;
      } else if (other && (!one || other.back < one.back)) {
        frames.push(other);
        ofB++;
      } else {
        frames.push({ back: one!.back, below: this.#union(one!.below, other!.below) });
        ofA++;
        ofB++;
      }
    }
    return this.#stackOf(frames, a.bottom || b.bottom);
  }

  /** Throws REQUEST_INVALID where the grammar has cost too much by now. */
  spend(steps: number): void {
    this.#credit -= steps;
    if (this.#credit >= 0) return;
    this.#credit = 0;
    throw tooAmbiguous();
  }
}

/** Threads on their way to closure; the same one met again over other stacks is one over all of them. */
class Reach {
  readonly stacks = new Map<number, StackSet>();
  mayEnd = false;
  /** Calls open at once, as far as was looked. */
  deepest = 0;
  readonly #open: number[] = [];
  readonly #union: (a: StackSet, b: StackSet) => StackSet;

  constructor(union: (a: StackSet, b: StackSet) => StackSet) {
    this.#union = union;
  }

  clear(): void {
    this.stacks.clear();
    this.#open.length = 0;
    this.mayEnd = false;
    this.deepest = 0;
  }

  add(thread: number, stack: StackSet): void {
    const before = this.stacks.get(thread);
    const now = before ? this.#union(before, stack) : stack;
    if (now === before) return;
    this.stacks.set(thread, now);
    this.#open.push(thread);
  }

  next(): number | undefined {
    return this.#open.pop();
  }
}

function tooAmbiguous(): PdError {
  return new PdError(
    'REQUEST_INVALID',
    'the grammar is too ambiguous: what has been generated can be read in too many ways; make its alternatives differ earlier',
    { grammar: true },
  );
}
