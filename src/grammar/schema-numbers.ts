/** Numbers within bounds, written without an exponent. */
import type { Budget } from './budget.ts';
import {
  characters,
  choice,
  EMPTY,
  type Expression,
  type GraphEdge,
  NOTHING,
  optional,
  repeat,
  sequence,
  spelledRanges,
  text,
} from './expression.ts';
import { DIGIT, INTEGER, NUMBER } from './json.ts';
import { intersection } from './regular.ts';
import { unsupportedKeyword } from './schema-document.ts';
import type { Facts } from './schema-facts.ts';

const MOST_DIGITS = 20;
const HIGHEST = 10n ** BigInt(MOST_DIGITS) - 1n;
/** Remainders are states. */
const MOST_DIVISOR = 2000;
const ZERO = 0x30;
const NINE = 0x39;

interface Bound {
  readonly value: number;
  readonly exclusive: boolean;
}

export function numberExpression(facts: Facts, integer: boolean, budget: Budget): Expression {
  const low = bound(facts.minimum, facts.exclusiveMinimum, Math.max);
  const high = bound(facts.maximum, facts.exclusiveMaximum, Math.min);
  const steps = facts.multiples.map(({ value, pointer }) => {
    const digits = -Math.log10(value);
    if (Number.isInteger(value) && value <= MOST_DIVISOR) return multiplesOf(value);
    if (!integer && Number.isInteger(digits) && digits > 0 && digits <= MOST_DIGITS) return decimals(digits);
    throw unsupportedKeyword(
      'multipleOf',
      pointer,
      `is ${value}: only whole numbers to ${MOST_DIVISOR} and 0.1, 0.01, ... are supported`,
    );
  });
  if (!low && !high && steps.length === 0) return integer ? INTEGER : NUMBER;
  const parts = [
    ...(low ? [atLeast(low)] : []),
    ...(high ? [atMost(high)] : []),
    integer ? INTEGER : decimals(MOST_DIGITS),
    ...steps,
  ];
  return parts.reduce((all, one) => intersection(all, one, budget));
}

/** The tighter of an inclusive and an exclusive one. */
function bound(
  value: number,
  exclusive: number,
  tighter: (a: number, b: number) => number,
): Bound | undefined {
  if (!Number.isFinite(value) && !Number.isFinite(exclusive)) return undefined;
  const tightest = tighter(value, exclusive);
  return { value: tightest, exclusive: tightest === exclusive };
}

function atLeast({ value, exclusive }: Bound): Expression {
  if (value >= 0) return magnitudeFrom(value, exclusive);
  return choice(magnitudeFrom(0, false), sequence(text('-'), magnitudeTo(-value, exclusive)));
}

function atMost({ value, exclusive }: Bound): Expression {
  if (value < 0) return sequence(text('-'), magnitudeFrom(-value, exclusive));
  return choice(
    sequence(text('-'), magnitudeFrom(0, value === 0 && exclusive)),
    magnitudeTo(value, exclusive),
  );
}

/** Unsigned, of `value` and more. */
function magnitudeFrom(value: number, exclusive: boolean): Expression {
  const { whole, digits } = decimal(value);
  return choice(
    sequence(naturals(whole + 1n, HIGHEST), anyFraction()),
    sequence(naturals(whole, whole), fraction(digits, true, !exclusive)),
  );
}

/** Unsigned, of `value` and less. */
function magnitudeTo(value: number, exclusive: boolean): Expression {
  const { whole, digits } = decimal(value);
  return choice(
    sequence(naturals(0n, whole - 1n), anyFraction()),
    sequence(naturals(whole, whole), fraction(digits, false, !exclusive)),
  );
}

/** Digits behind the point without zeros at their end. */
function decimal(value: number): { readonly whole: bigint; readonly digits: readonly number[] } {
  const [mantissa = '', exponent = '0'] = value.toString().split('e');
  const [before = '', after = ''] = mantissa.split('.');
  const shift = Number(exponent);
  const all = before + after;
  const point = before.length + shift;
  const padded = point <= 0 ? '0'.repeat(1 - point) + all : all.padEnd(point, '0');
  const split = Math.max(1, point);
  const digits = padded.slice(split).replace(/0+$/, '');
  return { whole: BigInt(padded.slice(0, split)), digits: Array.from(digits, Number) };
}

function anyFraction(): Expression {
  return optional(sequence(text('.'), repeat(DIGIT, 1, MOST_DIGITS)));
}

function decimals(most: number): Expression {
  return sequence(INTEGER, optional(sequence(text('.'), repeat(DIGIT, 1, most))));
}

/** Without leading zeros, from `low` to `high`. */
function naturals(low: bigint, high: bigint): Expression {
  const top = high > HIGHEST ? HIGHEST : high;
  const options: Expression[] = [];
  for (let from = low < 0n ? 0n : low; from <= top; ) {
    const length = from.toString().length;
    const last = 10n ** BigInt(length) - 1n;
    const to = last < top ? last : top;
    for (const ranges of spelledRanges(codes(from), codes(to), ZERO, NINE)) {
      options.push(sequence(...ranges.map((range) => characters(range))));
    }
    from = to + 1n;
  }
  return choice(...options);
}

function codes(value: bigint): number[] {
  return [...new TextEncoder().encode(value.toString())];
}

function digitsOf(low: number, high: number): Expression {
  return low > high ? NOTHING : characters([ZERO + low, ZERO + high]);
}

/**
 * What follows the point, nothing and no point included, compared with `digits`. State i: the first i digits are equal; two more: free, and
 * all digits equal with zeros behind them; the last one: the point has just been read.
 */
function fraction(digits: readonly number[], more: boolean, equalEnds: boolean): Expression {
  const length = digits.length;
  const [free, zeros, begun] = [length + 1, length + 2, length + 3];
  const edges: GraphEdge[] = [
    { from: 0, to: begun, item: text('.') },
    { from: free, to: free, item: DIGIT },
    ...(length > 0 ? [{ from: length, to: zeros, item: text('0') }] : []),
    { from: zeros, to: zeros, item: text('0') },
  ];
  const compare = (from: number, i: number) => {
    const digit = digits[i]!;
    edges.push(
      { from, to: i + 1, item: digitsOf(digit, digit) },
      { from, to: free, item: more ? digitsOf(digit + 1, 9) : digitsOf(0, digit - 1) },
    );
  };
  for (let i = 1; i < length; i++) compare(i, i);
  if (length > 0) compare(begun, 0);
  else edges.push({ from: begun, to: zeros, item: text('0') });
  if (more) {
    for (const from of [zeros, ...(length > 0 ? [length] : [begun])]) {
      edges.push({ from, to: free, item: digitsOf(1, 9) });
    }
  }
  // With digits still to come, what has been read is less.
  const ends = [free, ...(equalEnds ? [length, zeros] : [])];
  if (!more) for (let i = 0; i < length; i++) ends.push(i);
  return { kind: 'graph', size: length + 4, edges, ends };
}

/** Whole numbers; a state per remainder. */
function multiplesOf(divisor: number): Expression {
  const start = divisor;
  const edges: GraphEdge[] = [];
  for (let digit = 0; digit <= 9; digit++) {
    const item = digitsOf(digit, digit);
    if (digit > 0) edges.push({ from: start, to: digit % divisor, item });
    for (let rest = 0; rest < divisor; rest++) {
      edges.push({ from: rest, to: (rest * 10 + digit) % divisor, item });
    }
  }
  const begun: Expression = {
    kind: 'graph',
    size: divisor + 2,
    // A graph begins in its state 0, which is a remainder here.
    edges: edges
      .map(({ from, to, item }) => ({ from: from + 1, to: to + 1, item }))
      .concat({ from: 0, to: start + 1, item: EMPTY }),
    ends: [1],
  };
  return sequence(optional(text('-')), choice(text('0'), begun));
}
