/** Automata of single rules: over bytes, and over calls of other rules, which count as symbols here. */
import type { Budget } from './budget.ts';
import { type CodePointRange, type Expression, utf8Sequences } from './expression.ts';

export interface ByteEdge {
  readonly low: number;
  readonly high: number;
  readonly to: number;
}

export interface CallEdge {
  readonly rule: number;
  /** Where to go on once the rule has ended. */
  readonly to: number;
}

/** Begun in state 0, without empty moves. */
export interface Automaton {
  readonly edges: readonly (readonly ByteEdge[])[];
  readonly calls: readonly (readonly CallEdge[])[];
  readonly final: readonly boolean[];
}

/** A rule that stands for so many of `item`, or undefined where they are to be written out. */
export type CountedRule = (item: Expression, min: number, max: number) => number | undefined;

/** Thompson's construction. State 0 begins, state 1 ends. */
export class Nfa {
  readonly empty: number[][] = [];
  readonly edges: ByteEdge[][] = [];
  readonly calls: CallEdge[][] = [];
  readonly #budget: Budget;
  readonly #counted: CountedRule;
  readonly #ends = new Map<number, number>();

  constructor(expression: Expression, budget: Budget, counted: CountedRule) {
    this.#budget = budget;
    this.#counted = counted;
    this.#state();
    this.#state();
    this.#add(expression, 0, 1);
  }

  get size(): number {
    return this.empty.length;
  }

  #state(): number {
    this.#budget.states(1);
    this.empty.push([]);
    this.edges.push([]);
    return this.calls.push([]) - 1;
  }

  /** Nothing is ever added into `from` or out of `to`, so what shares either is not joined by it. */
  #add(expression: Expression, from: number, to: number): void {
    this.#budget.work(1);
    switch (expression.kind) {
      case 'byte':
        this.edges[from]!.push({ low: expression.low, high: expression.high, to });
        return;
      case 'character':
        this.#addCharacter(expression.ranges, from, to);
        return;
      case 'text':
        this.#addBytes(expression.bytes, from, to);
        return;
      case 'sequence':
        this.#addSequence(expression.items, from, to);
        return;
      case 'choice':
        for (const item of expression.items) this.#add(item, from, to);
        return;
      case 'repeat':
        this.#addRepeat(expression, from, to);
        return;
      case 'graph': {
        const states = Array.from({ length: expression.size }, () => this.#state());
        this.empty[from]!.push(states[0]!);
        for (const edge of expression.edges) this.#add(edge.item, states[edge.from]!, states[edge.to]!);
        for (const end of expression.ends) this.empty[states[end]!]!.push(to);
        return;
      }
      case 'rule':
        this.calls[from]!.push({ rule: expression.rule, to });
    }
  }

  #addSequence(items: readonly Expression[], from: number, to: number): void {
    if (items.length === 0) {
      this.empty[from]!.push(to);
      return;
    }
    let at = from;
    items.forEach((item, i) => {
      const next = i === items.length - 1 ? to : this.#state();
      this.#add(item, at, next);
      at = next;
    });
  }

  #addBytes(bytes: Uint8Array, from: number, to: number): void {
    if (bytes.length === 0) this.empty[from]!.push(to);
    let at = from;
    bytes.forEach((byte, i) => {
      const next = i === bytes.length - 1 ? to : this.#state();
      this.edges[at]!.push({ low: byte, high: byte, to: next });
      at = next;
    });
  }

  /** Spellings that end alike share their ends with all others before `to`. */
  #addCharacter(ranges: readonly CodePointRange[], from: number, to: number): void {
    for (const spelling of utf8Sequences(ranges)) {
      let at = to;
      for (let i = spelling.length - 1; i > 0; i--) at = this.#before(spelling[i]!, at);
      const [low, high] = spelling[0]!;
      this.edges[from]!.push({ low, high, to: at });
      this.#budget.work(1);
    }
  }

  /** The state of a spelling that goes on to `to` by a byte of the range alone. */
  #before([low, high]: CodePointRange, to: number): number {
    const key = (to * 256 + low) * 256 + high;
    let state = this.#ends.get(key);
    if (state === undefined) {
      state = this.#state();
      this.edges[state]!.push({ low, high, to });
      this.#ends.set(key, state);
    }
    return state;
  }

  #addRepeat({ item, min, max }: Expression & { kind: 'repeat' }, from: number, to: number): void {
    const counted = this.#counted(item, min, max);
    if (counted !== undefined) {
      this.calls[from]!.push({ rule: counted, to });
      return;
    }
    let at = from;
    for (let i = 0; i < min; i++) {
      const next = this.#state();
      this.#add(item, at, next);
      at = next;
    }
    if (max === Number.POSITIVE_INFINITY) {
      const loop = this.#state();
      this.empty[at]!.push(loop);
      const back = this.#state();
      this.#add(item, loop, back);
      this.empty[back]!.push(loop);
      at = loop;
    } else {
      for (let i = min; i < max; i++) {
        this.empty[at]!.push(to);
        const next = this.#state();
        this.#add(item, at, next);
        at = next;
      }
    }
    this.empty[at]!.push(to);
  }
}

/**
 * Without empty moves, and deterministic (no two edges of a state share a byte, no two calls a rule) where that takes at most
 * `mostStates`; undefined where it takes more and `mustBe` says that nothing else will do.
 */
export function automatonOf(
  nfa: Nfa,
  budget: Budget,
  mostStates: number,
  mustBe: true,
): Automaton | undefined;
export function automatonOf(nfa: Nfa, budget: Budget, mostStates: number, mustBe: false): Automaton;
export function automatonOf(
  nfa: Nfa,
  budget: Budget,
  mostStates: number,
  mustBe: boolean,
): Automaton | undefined {
  const deterministic = subsets(nfa, budget, mostStates);
  return deterministic ?? (mustBe ? undefined : subsets(nfa, budget, undefined));
}

/** States are sets of the NFA's; with `mostStates` undefined, what is reached from single ones of them. */
function subsets(nfa: Nfa, budget: Budget, mostStates: number | undefined): Automaton | undefined {
  const edges: ByteEdge[][] = [];
  const calls: CallEdge[][] = [];
  const final: boolean[] = [];
  const ids = new Map<string | number, number>();
  const sets: (readonly number[])[] = [];
  const idOf = (targets: readonly number[]): number => {
    const set = closure(nfa, targets, budget);
    // Most are of one.
    const key = set.length === 1 ? set[0]! : set.join(' ');
    let id = ids.get(key);
    if (id === undefined) {
      budget.states(1);
      id = sets.push(set) - 1;
      ids.set(key, id);
    }
    return id;
  };
  idOf([0]);
  for (let id = 0; id < sets.length; id++) {
    if (mostStates !== undefined && sets.length > mostStates) return undefined;
    const set = sets[id]!;
    final.push(set.includes(1));
    const outgoing = set.flatMap((state) => nfa.edges[state]!);
    const called = set.flatMap((state) => nfa.calls[state]!);
    budget.work(outgoing.length + called.length);
    if (mostStates === undefined) {
      edges.push(outgoing.map(({ low, high, to }) => ({ low, high, to: idOf([to]) })));
      calls.push(called.map(({ rule, to }) => ({ rule, to: idOf([to]) })));
      continue;
    }
    edges.push(
      splitByByte(outgoing, budget).map(({ low, high, targets }) => ({ low, high, to: idOf(targets) })),
    );
    const byRule = new Map<number, number[]>();
    for (const { rule, to } of called) {
      const targets = byRule.get(rule);
      if (targets) targets.push(to);
      else byRule.set(rule, [to]);
    }
    calls.push([...byRule].map(([rule, targets]) => ({ rule, to: idOf(targets) })));
  }
  return { edges, calls, final };
}

/** Sorted. */
function closure(nfa: Nfa, states: readonly number[], budget: Budget): readonly number[] {
  if (states.length === 1 && nfa.empty[states[0]!]!.length === 0) return states;
  const seen = new Set(states);
  for (const state of seen) {
    const next = nfa.empty[state]!;
    budget.work(1 + next.length);
    for (const one of next) seen.add(one);
  }
  return [...seen].sort((a, b) => a - b);
}

interface SplitEdge {
  readonly low: number;
  readonly high: number;
  readonly targets: readonly number[];
}

/** The edges again, cut so that none overlap; neighbours with the same targets are one. */
function splitByByte(edges: readonly ByteEdge[], budget: Budget): readonly SplitEdge[] {
  const sorted = edges.length < 2 ? edges : [...edges].sort((a, b) => a.low - b.low);
  if (sorted.every(({ low }, i) => i === 0 || low > sorted[i - 1]!.high)) return apart(sorted, budget);
  const cuts = [...new Set(edges.flatMap(({ low, high }) => [low, high + 1]))].sort((a, b) => a - b);
  const split: { low: number; high: number; targets: number[]; key: string }[] = [];
  let active: ByteEdge[] = [];
  let next = 0;
  for (let i = 0; i + 1 < cuts.length; i++) {
    const low = cuts[i]!;
    const high = cuts[i + 1]! - 1;
    active = active.filter((edge) => edge.high >= low);
    while (next < sorted.length && sorted[next]!.low <= low) active.push(sorted[next++]!);
    budget.work(active.length + 1);
    if (active.length === 0) continue;
    const targets = [...new Set(active.map(({ to }) => to))].sort((a, b) => a - b);
    const key = targets.join(' ');
    const last = split.at(-1);
    if (last && last.high === low - 1 && last.key === key) last.high = high;
    else split.push({ low, high, targets, key });
  }
  return split;
}

/** Likewise of edges in order that do not overlap. */
function apart(edges: readonly ByteEdge[], budget: Budget): readonly SplitEdge[] {
  budget.work(edges.length);
  const split: { low: number; high: number; targets: readonly [number] }[] = [];
  for (const { low, high, to } of edges) {
    const last = split.at(-1);
    if (last && last.high === low - 1 && last.targets[0] === to) last.high = high;
    else split.push({ low, high, targets: [to] });
  }
  return split;
}
