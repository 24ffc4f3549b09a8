/**
 * Times between tokens, and what happened while one of them was long. Pure.
 *
 *   joined     the first gap of its request: the one with the step that it came into the middle of
 *   shared     most of those that got a token at the same moment waited as long: the whole batch stood still, or its steps were slow.
 *              Told apart by whether another request got its first token meanwhile
 *   alone      nobody else waited: something on this stream's own way
 */
import { median, sumOf } from '../measure/statistics.ts';
import type { RequestRecord } from '../serve/record.ts';

/** A gap longer than this many medians is long. */
const LONG = 1.5;
/** Tokens of one step reach the client within this, ms. */
const TOGETHER_MS = 3;

export interface LongGaps {
  /** Of all gaps, and beyond how many ms one is long. */
  readonly gaps: number;
  readonly beyondMs: number;
  readonly joined: number;
  readonly sharedWithFirstToken: number;
  readonly shared: number;
  readonly alone: number;
  /** Mean length of long ones, ms. */
  readonly meanMs: number;
}

/**
 * Between two tokens as a client sees them. Where one event carries several (text that was held back until it was whole), and the server
 * says so, they share its gap.
 */
export function tokenGaps({ gapsMs, ids }: RequestRecord): readonly number[] {
  if (!ids) return gapsMs;
  return gapsMs.flatMap((gap, i) => {
    const tokens = Math.max(1, ids[i + 1]?.length ?? 1);
    return new Array<number>(tokens).fill(gap / tokens);
  });
}

interface Gap {
  readonly start: number;
  readonly end: number;
  /** Per token. */
  readonly ms: number;
  readonly isFirst: boolean;
}

/** `records` of all requests that ran at that time, those that do not count too. Undefined where there are no gaps. */
export function longGaps(records: readonly RequestRecord[]): LongGaps | undefined {
  const gaps = records.flatMap(gapsOf).sort((a, b) => a.start - b.start);
  if (gaps.length === 0) return undefined;
  const starts = gaps.map(({ start }) => start);
  const firsts = records
    .flatMap(({ sentMs, firstTokenMs }) => (firstTokenMs === undefined ? [] : [sentMs + firstTokenMs]))
    .sort((a, b) => a - b);
  const beyondMs = LONG * median(gaps.map(({ ms }) => ms));
  const isLong = ({ ms }: Gap) => ms > beyondMs;
  const counts = { joined: 0, sharedWithFirstToken: 0, shared: 0, alone: 0 };
  const long = gaps.filter(isLong);
  for (const gap of long) {
    if (gap.isFirst) {
      counts.joined++;
      continue;
    }
    const from = lowerBound(starts, gap.start - TOGETHER_MS);
    const to = lowerBound(starts, gap.start + TOGETHER_MS);
    const others = gaps.slice(from, to).filter((other) => other !== gap);
    if (others.length === 0 || 2 * others.filter(isLong).length < others.length) counts.alone++;
    else if (lowerBound(firsts, gap.start) < lowerBound(firsts, gap.end)) counts.sharedWithFirstToken++;
    else counts.shared++;
  }
  const meanMs = long.length === 0 ? 0 : sumOf(long.map(({ ms }) => ms)) / long.length;
  return { gaps: gaps.length, beyondMs, ...counts, meanMs };
}

function gapsOf({ sentMs, firstTokenMs, gapsMs, ids }: RequestRecord): Gap[] {
  if (firstTokenMs === undefined) return [];
  let end = sentMs + firstTokenMs;
  return gapsMs.map((gap, i) => {
    const start = end;
    end = start + gap;
    return { start, end, ms: gap / Math.max(1, ids?.[i + 1]?.length ?? 1), isFirst: i === 0 };
  });
}

/** How many of the ascending values lie below `value`. */
function lowerBound(ascending: readonly number[], value: number): number {
  let low = 0;
  let high = ascending.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ascending[middle]! < value) low = middle + 1;
    else high = middle;
  }
  return low;
}
