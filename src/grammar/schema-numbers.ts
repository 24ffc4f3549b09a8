/** Numbers within bounds, written without an exponent. */
import type { Budget } from './budget.ts';
import {
  characters,
  choice,
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
import { difference, intersection } from './regular.ts';
import { unsupportedKeyword } from './schema-document.ts';
import type { Facts } from './schema-facts.ts';

const MOST_DIGITS = 20;
const HIGHEST = 10n ** BigInt(MOST_DIGITS) - 1n;
/** Remainders are states, for each number of digits behind the point. */
const MOST_REMAINDERS = 2000;
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
    const { whole, digits } = decimal(value);
    const scaled = Number(whole) * 10 ** digits.length + Number(digits.join('') || '0');
    if (scaled * (digits.length + 1) <= MOST_REMAINDERS) return multiplesOf(scaled, digits.length);
    throw unsupportedKeyword('multipleOf', pointer, `is ${value}, which takes too many states`);
  });
  const excluded = facts.excluded.filter((value): value is number => typeof value === 'number');
  if (!low && !high && steps.length + excluded.length === 0) return integer ? INTEGER : NUMBER;
  const parts = [
    ...(low ? [atLeast(low)] : []),
    ...(high ? [atMost(high)] : []),
    integer ? INTEGER : decimals(MOST_DIGITS),
    ...steps,
  ];
  const all = parts.reduce((some, one) => intersection(some, one, budget));
  return excluded.reduce<Expression>((some, value) => difference(some, spellings(value), budget), all);
}

/** Every way to write `value` without an exponent. */
function spellings(value: number): Expression {
  const { whole, digits } = decimal(Math.abs(value));
  const zeros = repeat(text('0'), 0, MOST_DIGITS);
  const rest =
    digits.length > 0
      ? sequence(text(`.${digits.join('')}`), zeros)
      : optional(sequence(text('.'), text('0'), zeros));
  const magnitude = sequence(text(whole.toString()), rest);
  if (value === 0) return sequence(optional(text('-')), magnitude);
  return value < 0 ? sequence(text('-'), magnitude) : magnitude;
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

/** Of `divisor` / 10^`decimals`. A state per remainder and digits behind the point; at its end the text has so many or fewer. */
function multiplesOf(divisor: number, decimals: number): Expression {
  // State 0 begins; then whole numbers, by remainder; then, by digits behind the point, the same.
  const stateOf = (rest: number, behind: number) => 1 + behind * divisor + rest;
  const start = { from: 0, item: digitsOf(0, 0), to: stateOf(0, decimals + 1) };
  const zero = stateOf(0, decimals + 1);
  const point = (rest: number) => stateOf(rest, decimals + 1) + 1;
  const edges: GraphEdge[] = [start];
  const ends: number[] = [zero];
  for (let digit = 0; digit <= 9; digit++) {
    const item = digitsOf(digit, digit);
    if (digit > 0) edges.push({ from: 0, to: stateOf(digit % divisor, 0), item });
    for (let rest = 0; rest < divisor; rest++) {
      const next = (rest * 10 + digit) % divisor;
      edges.push({ from: stateOf(rest, 0), to: stateOf(next, 0), item });
      if (decimals > 0) edges.push({ from: point(rest), to: stateOf(next, 1), item });
      for (let behind = 1; behind < decimals; behind++) {
        edges.push({ from: stateOf(rest, behind), to: stateOf(next, behind + 1), item });
      }
    }
  }
  for (let rest = 0; rest < divisor; rest++) {
    if (decimals > 0) edges.push({ from: stateOf(rest, 0), to: point(rest), item: text('.') });
    for (let behind = 0; behind <= decimals; behind++) {
      if ((rest * 10 ** (decimals - behind)) % divisor === 0) ends.push(stateOf(rest, behind));
    }
  }
  if (decimals > 0) edges.push({ from: zero, to: point(0), item: text('.') });
  const magnitude: Expression = { kind: 'graph', size: point(divisor), edges, ends };
  return sequence(optional(text('-')), magnitude);
}
