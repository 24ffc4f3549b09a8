/** What a grammar is written in before it is built: expressions over bytes, and rules that name each other. Plain data. */

/** Inclusive, in code points. */
export type CodePointRange = readonly [low: number, high: number];

export type Expression =
  /** One byte of a range. */
  | { readonly kind: 'byte'; readonly low: number; readonly high: number }
  /** One character, written in UTF-8. No ranges: nothing matches. */
  | { readonly kind: 'character'; readonly ranges: readonly CodePointRange[] }
  | { readonly kind: 'text'; readonly bytes: Uint8Array }
  | { readonly kind: 'sequence'; readonly items: readonly Expression[] }
  /** No items: nothing matches. */
  | { readonly kind: 'choice'; readonly items: readonly Expression[] }
  /** `max` may be Infinity. */
  | { readonly kind: 'repeat'; readonly item: Expression; readonly min: number; readonly max: number }
  /** States 0 to `size` - 1, begun in 0; what has several ways to go on that join again, without writing each of them out. */
  | {
      readonly kind: 'graph';
      readonly size: number;
      readonly edges: readonly GraphEdge[];
      readonly ends: readonly number[];
    }
  | { readonly kind: 'rule'; readonly rule: number };

export interface GraphEdge {
  readonly from: number;
  readonly to: number;
  readonly item: Expression;
}

export interface Rule {
  /** As errors name it. */
  readonly name: string;
  readonly body: Expression;
  /** A JSON array whose items differ: `body` writes each of them in one way, but for blanks. */
  readonly unique?: boolean | undefined;
}

/** The sentences of rule 0. */
export interface Grammar {
  readonly rules: readonly Rule[];
}

export const LAST_CODE_POINT = 0x10ffff;

/** Matches the empty text alone. */
export const EMPTY: Expression = { kind: 'sequence', items: [] };
export const NOTHING: Expression = { kind: 'choice', items: [] };

const UTF8 = new TextEncoder();

export function text(value: string): Expression {
  return { kind: 'text', bytes: UTF8.encode(value) };
}

export function sequence(...items: readonly Expression[]): Expression {
  return items.length === 1 ? items[0]! : { kind: 'sequence', items };
}

export function choice(...items: readonly Expression[]): Expression {
  return items.length === 1 ? items[0]! : { kind: 'choice', items };
}

export function repeat(item: Expression, min: number, max: number): Expression {
  return { kind: 'repeat', item, min, max };
}

export function optional(item: Expression): Expression {
  return repeat(item, 0, 1);
}

export function characters(...ranges: readonly CodePointRange[]): Expression {
  return { kind: 'character', ranges };
}

/** The characters of `value`, any one of them. */
export function oneOf(value: string): Expression {
  return characters(
    ...Array.from(value, (one): CodePointRange => [one.codePointAt(0)!, one.codePointAt(0)!]),
  );
}

export function rule(index: number): Expression {
  return { kind: 'rule', rule: index };
}

/** Sorted, without overlaps or gaps of nothing. */
function normalRanges(ranges: readonly CodePointRange[]): CodePointRange[] {
  const sorted = ranges.filter(([low, high]) => low <= high).sort((a, b) => a[0] - b[0]);
  const normal: [number, number][] = [];
  for (const [low, high] of sorted) {
    const last = normal.at(-1);
    if (last && low <= last[1] + 1) last[1] = Math.max(last[1], high);
    else normal.push([low, high]);
  }
  return normal;
}

/** Every code point that is in none of `ranges`. */
export function otherRanges(ranges: readonly CodePointRange[]): CodePointRange[] {
  const others: CodePointRange[] = [];
  let next = 0;
  for (const [low, high] of normalRanges(ranges)) {
    if (low > next) others.push([next, low - 1]);
    next = high + 1;
  }
  if (next <= LAST_CODE_POINT) others.push([next, LAST_CODE_POINT]);
  return others;
}

/** Byte ranges, one per byte of a character, that together spell exactly the characters of `ranges`; surrogates have no spelling. */
export function utf8Sequences(ranges: readonly CodePointRange[]): CodePointRange[][] {
  const sequences: CodePointRange[][] = [];
  for (const [low, high] of normalRanges(ranges)) {
    for (const [first, last, all] of UTF8_LENGTHS) {
      const from = Math.max(low, first);
      const to = Math.min(high, last);
      if (from > to) continue;
      // Most are of one byte, or run over all that are longer.
      if (last === LAST_ASCII) sequences.push([[from, to]]);
      else if (from === first && to === last) sequences.push(...all);
      else sequences.push(...spelled(from, to));
    }
  }
  return sequences;
}

const LAST_ASCII = 0x7f;

/** Code points whose spellings have the same number of bytes, and how all of them are spelled. */
const UTF8_LENGTHS = (
  [
    [0, LAST_ASCII],
    [0x80, 0x7ff],
    [0x800, 0xd7ff],
    [0xe000, 0xffff],
    [0x10000, LAST_CODE_POINT],
  ] as const
).map(([first, last]) => [first, last, spelled(first, last)] as const);

/** Both ends are spelled in as many bytes. */
function spelled(first: number, last: number): CodePointRange[][] {
  return spelledRanges(utf8Bytes(first), utf8Bytes(last), 0x80, 0xbf);
}

function utf8Bytes(codePoint: number): number[] {
  return [...UTF8.encode(String.fromCodePoint(codePoint))];
}

/** Texts of one length from `low` to `high`, as ranges one per unit; units that are free run from `least` to `most`. */
export function spelledRanges(
  low: readonly number[],
  high: readonly number[],
  least: number,
  most: number,
): CodePointRange[][] {
  const [first, ...lowRest] = low;
  const [last, ...highRest] = high;
  if (first === undefined || last === undefined) return [[]];
  const behind = (range: CodePointRange, rests: CodePointRange[][]) => rests.map((rest) => [range, ...rest]);
  if (first === last) return behind([first, first], spelledRanges(lowRest, highRest, least, most));
  const ranges: CodePointRange[][] = [];
  let from = first;
  let to = last;
  if (lowRest.some((unit) => unit !== least)) {
    ranges.push(
      ...behind(
        [first, first],
        spelledRanges(
          lowRest,
          lowRest.map(() => most),
          least,
          most,
        ),
      ),
    );
    from++;
  }
  if (highRest.some((unit) => unit !== most)) {
    ranges.push(
      ...behind(
        [last, last],
        spelledRanges(
          highRest.map(() => least),
          highRest,
          least,
          most,
        ),
      ),
    );
    to--;
  }
  if (from <= to) ranges.push([[from, to], ...lowRest.map((): CodePointRange => [least, most])]);
  return ranges;
}
