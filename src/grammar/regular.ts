/** Regular expressions as sets: what is in both of two, or in one and not in the other. */
import { PdError } from '../errors.ts';
import { type Automaton, automatonOf, Nfa } from './automaton.ts';
import type { Budget } from './budget.ts';
import type { Expression, GraphEdge } from './expression.ts';

/** Either side may grow to so many states, deterministic. */
const MOST_STATES = 20_000;

/** Sentences of both. Neither may name a rule. Throws REQUEST_INVALID where that takes too many states. */
export function intersection(a: Expression, b: Expression, budget: Budget): Expression {
  return product(deterministic(a, budget), deterministic(b, budget), true, budget);
}

/** Sentences of `a` that are none of `b`. */
export function difference(a: Expression, b: Expression, budget: Budget): Expression {
  return product(deterministic(a, budget), deterministic(b, budget), false, budget);
}

/** Whether `value` is a sentence of `expression`. */
export function matches(expression: Expression, value: string, budget: Budget): boolean {
  const { edges, final } = automatonOf(new Nfa(expression, budget, () => undefined), budget, 0, false);
  let states = new Set([0]);
  for (const byte of new TextEncoder().encode(value)) {
    const next = new Set<number>();
    for (const state of states) {
      for (const { low, high, to } of edges[state]!) if (low <= byte && byte <= high) next.add(to);
    }
    states = next;
    budget.work(states.size);
  }
  return [...states].some((state) => final[state]);
}

/** Whether nothing matches. Of an expression without rules. */
export function isNothing(expression: Expression, budget: Budget): boolean {
  const { final } = automatonOf(new Nfa(expression, budget, () => undefined), budget, 0, false);
  return !final.includes(true);
}

function deterministic(expression: Expression, budget: Budget): Automaton {
  const automaton = automatonOf(new Nfa(expression, budget, () => undefined), budget, MOST_STATES, true);
  if (automaton) return automaton;
  throw new PdError(
    'REQUEST_INVALID',
    'the grammar is too large: a pattern that is combined with other conditions takes too many states',
  );
}

/** A state of `a`, and one of `b` or, where b has already failed, -1. */
function product(a: Automaton, b: Automaton, both: boolean, budget: Budget): Expression {
  const ids = new Map<number, number>();
  const pairs: (readonly [number, number])[] = [];
  const edges: GraphEdge[] = [];
  const idOf = (ofA: number, ofB: number): number => {
    const key = ofA * (b.final.length + 1) + ofB + 1;
    let id = ids.get(key);
    if (id === undefined) {
      budget.states(1);
      id = pairs.push([ofA, ofB]) - 1;
      ids.set(key, id);
    }
    return id;
  };
  idOf(0, 0);
  for (let from = 0; from < pairs.length; from++) {
    const [ofA, ofB] = pairs[from]!;
    const others = ofB < 0 ? [] : b.edges[ofB]!;
    const add = (low: number, high: number, to: number) =>
      edges.push({ from, to, item: { kind: 'byte', low, high } });
    for (const { low, high, to } of a.edges[ofA]!) {
      let next = low;
      for (const other of others) {
        budget.work(1);
        if (other.high < next || other.low > high) continue;
        if (!both && other.low > next) add(next, other.low - 1, idOf(to, -1));
        add(Math.max(next, other.low), Math.min(high, other.high), idOf(to, other.to));
        next = other.high + 1;
      }
      if (!both && next <= high) add(next, high, idOf(to, -1));
    }
  }
  const ends = pairs.flatMap(([ofA, ofB], id) => {
    const inB = ofB >= 0 && b.final[ofB]!;
    return a.final[ofA] && inB === both ? [id] : [];
  });
  return { kind: 'graph', size: pairs.length, edges, ends };
}
