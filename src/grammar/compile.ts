/** From a grammar to the tables that a matcher runs on. Pure; fails by name where the grammar is not one, or costs too much. */
import { PdError } from '../errors.ts';
import { type Automaton, automatonOf, Nfa } from './automaton.ts';
import type { Budget } from './budget.ts';
import type { Expression, Grammar } from './expression.ts';

/** Plain data: crosses threads as it is. States are numbered through all rules. */
export interface CompiledGrammar {
  readonly numStates: number;
  readonly start: number;
  /** State s has edges `edgeStart[s]` to `edgeStart[s + 1]` - 1, each of bytes low to high. */
  readonly edgeStart: Int32Array;
  readonly edgeLow: Uint8Array;
  readonly edgeHigh: Uint8Array;
  readonly edgeTo: Int32Array;
  /** Likewise: the first state of the rule that is called, and where to go on after it. */
  readonly callStart: Int32Array;
  readonly callTarget: Int32Array;
  readonly callReturn: Int32Array;
  /** 1: the rule may end here; 2: nothing else can be done here. */
  readonly final: Uint8Array;
  /** Calls that are open at once, at least, until the rule can end from here. */
  readonly height: Int32Array;
  /** Of states in a counted rule, its number; else -1. */
  readonly counted: Int32Array;
  readonly countedStart: Int32Array;
  readonly countedMin: Int32Array;
  /** -1: no limit. */
  readonly countedMax: Int32Array;
  /** First states of rules of arrays whose items differ. */
  readonly uniqueStarts: Int32Array;
  /** Bytes that no edge tells apart have one class. */
  readonly classOf: Uint8Array;
  readonly classBytes: Uint8Array;
  /** Of states in small rules without calls, what they are made of: alike in every grammar. */
  readonly shapes: readonly (string | undefined)[];
  /** Per state: its rule's row of `shapes`, and its place in it. */
  readonly shapeOf: Int32Array;
  readonly shapeState: Int32Array;
}

/** Calls open at once; a sentence that needs more is not begun. */
export const MOST_DEPTH = 512;
/** Counted rather than written out: that many states and more. */
const COUNTED_FROM = 48;
const COUNTED_BODY_STATES = 64;
const SHAPE_EDGES = 512;

interface BuiltRule {
  readonly name: string;
  readonly automaton: Automaton;
  readonly unique?: boolean | undefined;
  readonly counted?: { readonly min: number; readonly max: number };
}

/** Throws REQUEST_INVALID: what recurs on its left, matches nothing, or is too large. */
export function compileGrammar(grammar: Grammar, budget: Budget): CompiledGrammar {
  const rules = buildRules(grammar, budget);
  const heights = heightsOf(rules, budget);
  if (!Number.isFinite(heights[0]![0]!)) {
    throw new PdError('REQUEST_INVALID', 'the grammar matches nothing: no text could ever end it');
  }
  if (heights[0]![0]! > MOST_DEPTH) {
    throw new PdError('REQUEST_INVALID', `the grammar nests deeper than ${MOST_DEPTH} even at its shortest`);
  }
  refuseLeftRecursion(rules);
  return flatten(rules, heights, budget);
}

function buildRules(grammar: Grammar, budget: Budget): BuiltRule[] {
  const extra: BuiltRule[] = [];
  const bodies = new Map<Expression, { size: number; automaton: Automaton | undefined }>();
  const numbers = new Map<string, number>();
  const ids = new Map<Expression, number>();
  const counted = (item: Expression, min: number, max: number): number | undefined => {
    const count = Math.max(min, Number.isFinite(max) ? max : 0);
    if (count <= 4 || namesRules(item)) return undefined;
    let body = bodies.get(item);
    if (!body) {
      const nfa = new Nfa(item, budget, () => undefined);
      const automaton = automatonOf(nfa, budget, COUNTED_BODY_STATES, true);
      body = { size: nfa.size, automaton: automaton && selfDelimiting(automaton) };
      bodies.set(item, body);
      ids.set(item, ids.size);
    }
    if (!body.automaton || body.size * count < COUNTED_FROM) return undefined;
    const key = `${ids.get(item)} ${min} ${max}`;
    let number = numbers.get(key);
    if (number === undefined) {
      const rule = { name: `{${min},${max}}`, automaton: body.automaton, counted: { min, max } };
      number = grammar.rules.length + extra.push(rule) - 1;
      numbers.set(key, number);
    }
    return number;
  };
  const rules = grammar.rules.map(({ name, body, unique }): BuiltRule => {
    const nfa = new Nfa(body, budget, counted);
    return { name, unique, automaton: automatonOf(nfa, budget, nfa.size * 4 + 256, false) };
  });
  return [...rules, ...extra];
}

function namesRules(expression: Expression): boolean {
  switch (expression.kind) {
    case 'sequence':
    case 'choice':
      return expression.items.some(namesRules);
    case 'repeat':
      return namesRules(expression.item);
    case 'graph':
      return expression.edges.some(({ item }) => namesRules(item));
    case 'rule':
      return true;
    case 'byte':
    case 'character':
    case 'text':
      return false;
  }
}

/**
 * The same with its ends led back to its start, so that it reads one body after another; undefined where a body can be empty or begin
 * another one, as bodies could not be counted by their bytes alone then.
 */
function selfDelimiting({ edges, calls, final }: Automaton): Automaton | undefined {
  if (final[0]) return undefined;
  if (edges.some((list, state) => final[state] && list.length > 0)) return undefined;
  return {
    edges: edges.map((list) => list.map(({ low, high, to }) => ({ low, high, to: final[to] ? 0 : to }))),
    calls,
    final: final.map((_, state) => state === 0),
  };
}

/**
 * Per rule and state: of all ways to the rule's end, the one with the fewest calls open at once. Infinity where there is none. In
 * rounds: in round k, rules that need fewer than k may be called.
 */
function heightsOf(rules: readonly BuiltRule[], budget: Budget): number[][] {
  const heights = rules.map(({ automaton }) => automaton.final.map(() => Number.POSITIVE_INFINITY));
  type Place = readonly [rule: number, state: number];
  const before: Place[][][] = rules.map(({ automaton }) => automaton.final.map(() => []));
  const calledBefore: { readonly state: number; readonly callee: number }[][][] = rules.map(({ automaton }) =>
    automaton.final.map(() => []),
  );
  const callers: { readonly rule: number; readonly state: number; readonly to: number }[][] = rules.map(
    () => [],
  );
  rules.forEach(({ automaton }, rule) => {
    automaton.edges.forEach((list, state) => {
      budget.work(list.length + 1);
      for (const { to } of list) before[rule]![to]!.push([rule, state]);
      for (const { rule: callee, to } of automaton.calls[state]!) {
        calledBefore[rule]![to]!.push({ state, callee });
        callers[callee]!.push({ rule, state, to });
      }
    });
  });
  let settling: Place[] = rules.flatMap(({ automaton }, rule) =>
    automaton.final.flatMap((final, state): Place[] => (final ? [[rule, state]] : [])),
  );
  for (let round = 0; settling.length > 0; round++) {
    const next: Place[] = [];
    for (const [rule, state] of settling) {
      if (Number.isFinite(heights[rule]![state])) continue;
      heights[rule]![state] = round;
      budget.work(before[rule]![state]!.length + 1);
      settling.push(...before[rule]![state]!);
      for (const { state: caller, callee } of calledBefore[rule]![state]!) {
        if (heights[callee]![0]! < round) settling.push([rule, caller]);
        else if (Number.isFinite(heights[callee]![0])) next.push([rule, caller]);
      }
      if (state !== 0) continue;
      for (const caller of callers[rule]!) {
        if (Number.isFinite(heights[caller.rule]![caller.to])) next.push([caller.rule, caller.state]);
      }
    }
    settling = next;
  }
  return heights;
}

/** A rule that calls itself before it has read a byte would never begin. */
function refuseLeftRecursion(rules: readonly BuiltRule[]): void {
  const nullable = rules.map(() => false);
  const first = rules.map((): number[] => []);
  for (let changed = true; changed; ) {
    changed = false;
    rules.forEach(({ automaton, counted }, rule) => {
      if (nullable[rule]) return;
      const reached = reachedEmpty(automaton, nullable);
      first[rule] = reached.flatMap((state) => automaton.calls[state]!.map((call) => call.rule));
      nullable[rule] = counted ? counted.min === 0 : reached.some((state) => automaton.final[state]);
      changed ||= nullable[rule]!;
    });
  }
  rules.forEach(({ automaton }, rule) => {
    const reached = reachedEmpty(automaton, nullable);
    first[rule] = reached.flatMap((state) => automaton.calls[state]!.map((call) => call.rule));
  });
  const done = new Set<number>();
  for (let root = 0; root < rules.length; root++) {
    const path: { readonly rule: number; next: number }[] = [{ rule: root, next: 0 }];
    const open = new Set([root]);
    while (path.length > 0) {
      const top = path.at(-1)!;
      const callee = done.has(top.rule) ? undefined : first[top.rule]![top.next++];
      if (callee === undefined) {
        done.add(top.rule);
        open.delete(top.rule);
        path.pop();
      } else if (open.has(callee)) {
        throw new PdError(
          'REQUEST_INVALID',
          `rule "${rules[callee]!.name}" of the grammar recurs on its left: write it as a repetition`,
        );
      } else if (!done.has(callee)) {
        open.add(callee);
        path.push({ rule: callee, next: 0 });
      }
    }
  }
}

/** States that a rule comes to without a byte. */
function reachedEmpty({ calls }: Automaton, nullable: readonly boolean[]): number[] {
  const reached = new Set([0]);
  for (const state of reached) {
    for (const { rule, to } of calls[state]!) if (nullable[rule]) reached.add(to);
  }
  return [...reached];
}

function flatten(
  rules: readonly BuiltRule[],
  heights: readonly (readonly number[])[],
  budget: Budget,
): CompiledGrammar {
  // What cannot come to an end is left out, so that whatever is begun can be ended.
  const alive = (rule: number, state: number) => Number.isFinite(heights[rule]![state]!);
  const offsets: number[] = [];
  let numStates = 0;
  for (const { automaton } of rules) {
    offsets.push(numStates);
    numStates += automaton.final.length;
  }
  const edgeStart = new Int32Array(numStates + 1);
  const callStart = new Int32Array(numStates + 1);
  const final = new Uint8Array(numStates);
  const height = new Int32Array(numStates);
  const counted = new Int32Array(numStates).fill(-1);
  const shapeOf = new Int32Array(numStates);
  const shapeState = new Int32Array(numStates);
  const [edgeLow, edgeHigh, edgeTo]: [number[], number[], number[]] = [[], [], []];
  const [callTarget, callReturn]: [number[], number[]] = [[], []];
  const [countedStart, countedMin, countedMax]: [number[], number[], number[]] = [[], [], []];
  const shapes: (string | undefined)[] = [];
  const cuts = new Set([0]);
  rules.forEach((built, rule) => {
    const { automaton } = built;
    const offset = offsets[rule]!;
    if (built.counted) {
      countedStart.push(offset);
      countedMin.push(built.counted.min);
      countedMax.push(Number.isFinite(built.counted.max) ? built.counted.max : -1);
    }
    shapes.push(shapeText(built));
    automaton.final.forEach((isFinal, local) => {
      const state = offset + local;
      budget.work(1);
      shapeOf[state] = rule;
      shapeState[state] = local;
      edgeStart[state] = edgeTo.length;
      callStart[state] = callTarget.length;
      if (built.counted) counted[state] = countedStart.length - 1;
      if (!alive(rule, local)) return;
      height[state] = heights[rule]![local]!;
      for (const { low, high, to } of automaton.edges[local]!) {
        if (!alive(rule, to)) continue;
        edgeLow.push(low);
        edgeHigh.push(high);
        edgeTo.push(offset + to);
        cuts.add(low).add(high + 1);
      }
      for (const { rule: callee, to } of automaton.calls[local]!) {
        if (!alive(rule, to) || !alive(callee, 0)) continue;
        callTarget.push(offsets[callee]!);
        callReturn.push(offset + to);
      }
      const isDone = edgeStart[state] === edgeTo.length && callStart[state] === callTarget.length;
      if (isFinal) final[state] = isDone ? 2 : 1;
    });
  });
  edgeStart[numStates] = edgeTo.length;
  callStart[numStates] = callTarget.length;
  const classBytes = Uint8Array.from([...cuts].filter((cut) => cut < 256).sort((a, b) => a - b));
  const classOf = new Uint8Array(256);
  for (let byte = 0, one = 0; byte < 256; byte++) {
    if (byte > 0 && classBytes[one + 1] === byte) one++;
    classOf[byte] = one;
  }
  return {
    numStates,
    start: offsets[0]!,
    edgeStart,
    edgeLow: Uint8Array.from(edgeLow),
    edgeHigh: Uint8Array.from(edgeHigh),
    edgeTo: Int32Array.from(edgeTo),
    callStart,
    callTarget: Int32Array.from(callTarget),
    callReturn: Int32Array.from(callReturn),
    final,
    height,
    counted,
    countedStart: Int32Array.from(countedStart),
    countedMin: Int32Array.from(countedMin),
    countedMax: Int32Array.from(countedMax),
    uniqueStarts: Int32Array.from(rules.flatMap(({ unique }, rule) => (unique ? [offsets[rule]!] : []))),
    classOf,
    classBytes,
    shapes,
    shapeOf,
    shapeState,
  };
}

/** Equal where two rules read the same bytes from the same states; of a counted rule without its counts. */
function shapeText({ automaton, counted }: BuiltRule): string | undefined {
  const { edges, calls, final } = automaton;
  let numEdges = 0;
  for (const list of edges) numEdges += list.length;
  if (numEdges > SHAPE_EDGES || calls.some((list) => list.length > 0)) return undefined;
  const states = edges.map(
    (list, state) =>
      `${final[state] ? '!' : ''}${list.map(({ low, high, to }) => `${low}-${high}>${to}`).join(',')}`,
  );
  return `${counted ? '*' : ''}${states.join(';')}`;
}
