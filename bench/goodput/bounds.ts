/**
 * Which requests met the bounds, and which bound each of the others broke. Pure. As in `pd-bench serve`: one bound on the time to the first
 * token, one on the request's mean time per output token after it.
 */
import type { RequestRecord } from '../serve/record.ts';
import { tpotOf } from '../serve/summary.ts';

export interface Bounds {
  readonly ttftMs: number;
  /** Each is evaluated by itself, beside the one on the first token. */
  readonly itlMs: readonly number[];
}

/** `failed`: answered with an error, or not in full although no bound was broken until then. */
export const BROKEN = ['first token', 'per token', 'both', 'failed'] as const;
export type Broken = (typeof BROKEN)[number];

/** Undefined: a good request. One that was cut off at the end of a run is judged by what came until then. */
export function brokenOf(record: RequestRecord, ttftMs: number, itlMs: number): Broken | undefined {
  if (record.outcome === 'failed') return 'failed';
  const late = (record.firstTokenMs ?? Number.POSITIVE_INFINITY) > ttftMs;
  const slow = (tpotOf(record) ?? 0) > itlMs;
  if (late && slow) return 'both';
  if (late) return 'first token';
  if (slow) return 'per token';
  return record.outcome === 'done' ? undefined : 'failed';
}

export interface BoundResult {
  readonly itlMs: number;
  readonly good: number;
  readonly goodPerSecond: number;
  readonly broke: Readonly<Record<Broken, number>>;
}

export function judge(records: readonly RequestRecord[], bounds: Bounds, seconds: number): BoundResult[] {
  return bounds.itlMs.map((itlMs) => {
    const broke: Record<Broken, number> = { 'first token': 0, 'per token': 0, both: 0, failed: 0 };
    let good = 0;
    for (const record of records) {
      const broken = brokenOf(record, bounds.ttftMs, itlMs);
      if (broken) broke[broken]++;
      else good++;
    }
    return { itlMs, good, goodPerSecond: good / seconds, broke };
  });
}

export interface MissedRequest {
  readonly index: number;
  /** After the start of the run, ms. */
  readonly sentMs: number;
  readonly ttftMs?: number;
  readonly tpotMs?: number;
  /** By bound on the time per token; absent for a bound that it met. */
  readonly broke: Readonly<Record<string, Broken>>;
}

/** Those that missed any of the bounds. */
export function missedOf(records: readonly RequestRecord[], { ttftMs, itlMs }: Bounds): MissedRequest[] {
  return records.flatMap((record) => {
    const broke = Object.fromEntries(
      itlMs.flatMap((bound) => {
        const broken = brokenOf(record, ttftMs, bound);
        return broken ? [[`${bound} ms`, broken] as const] : [];
      }),
    );
    if (Object.keys(broke).length === 0) return [];
    const tpotMs = tpotOf(record);
    const { index, firstTokenMs } = record;
    return [
      {
        index,
        sentMs: rounded(record.sentMs),
        ...(firstTokenMs !== undefined && { ttftMs: rounded(firstTokenMs) }),
        ...(tpotMs !== undefined && { tpotMs: rounded(tpotMs) }),
        broke,
      },
    ];
  });
}

function rounded(ms: number): number {
  return Math.round(ms * 100) / 100;
}
