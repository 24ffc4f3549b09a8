/** The summary of a run. Pure. Only requests that were answered in full count in times, tokens and throughput. */

import { type Spread, spreadOf, sumOf } from '../measure/statistics.ts';
import type { LoadResult } from './load.ts';
import type { Failure, RequestRecord } from './record.ts';

/** Milliseconds; a request is good if it meets all that are given. */
export interface Objectives {
  readonly ttftMs?: number;
  /** Limit on the request's mean time per output token after the first. */
  readonly itlMs?: number;
}

export interface FailureCount extends Failure {
  readonly count: number;
}

export interface ServeSummary {
  readonly requests: {
    readonly planned: number;
    readonly done: number;
    readonly failed: number;
    /** Sent but not answered when the benchmark was stopped. */
    readonly interrupted: number;
  };
  /** By code, most frequent first, each with its first message. */
  readonly failures: readonly FailureCount[];
  readonly durationMs: number;
  readonly mostRunning: number;
  /** All times in milliseconds; absent if nothing was measured. */
  readonly ttftMs?: Spread;
  /** Between one event with text and the next, over all requests. */
  readonly itlMs?: Spread;
  /** Per request: from the first event with text to the last, per output token after the first. */
  readonly tpotMs?: Spread;
  readonly e2eMs?: Spread;
  /** For a rate: how late requests were sent. */
  readonly lateMs?: Spread;
  readonly requestsPerSecond: number;
  readonly outputTokensPerSecond: number;
  /** Prompt and output. */
  readonly totalTokensPerSecond: number;
  readonly promptTokens: number;
  readonly outputTokens: number;
  /** Tokens of prompts and answers come from the server's usage, for all requests. */
  readonly countedByServer: boolean;
  readonly tokensPerEvent?: number;
  /** Answers of a different length than requested. */
  readonly otherOutputLength: number;
  /** Prompts of a different length than requested, according to the server. */
  readonly otherPromptLength: number;
  /** Answers without any text, and so without a first token that a client could see. */
  readonly withoutText: number;
  readonly goodput?: {
    readonly objectives: Objectives;
    readonly good: number;
    readonly requestsPerSecond: number;
  };
}

export function summarize(load: LoadResult, planned: number, objectives: Objectives = {}): ServeSummary {
  const { records, durationMs, lateMs, mostRunning } = load;
  const of = (outcome: RequestRecord['outcome']) => records.filter((record) => record.outcome === outcome);
  const done = of('done');
  const seconds = durationMs / 1_000;
  const perSecond = (count: number) => (seconds > 0 ? count / seconds : 0);
  const outputTokens = sumOf(done.map((record) => record.outputTokens));
  const promptTokens = sumOf(done.map((record) => record.promptTokens ?? record.asked.promptTokens ?? 0));
  const gaps = done.flatMap((record) => record.gapsMs);
  const events = sumOf(done.filter(hasText).map((record) => record.gapsMs.length + 1));
  const textTokens = sumOf(done.filter(hasText).map((record) => record.outputTokens));
  const spreads = {
    ttftMs: spreadOf(done.flatMap((record) => record.firstTokenMs ?? [])),
    itlMs: spreadOf(gaps),
    tpotMs: spreadOf(done.flatMap((record) => tpotOf(record) ?? [])),
    e2eMs: spreadOf(done.map((record) => record.endToEndMs)),
    lateMs: spreadOf(lateMs),
  };
  const good = done.filter((record) => isGood(record, objectives)).length;
  const asked = objectives.ttftMs !== undefined || objectives.itlMs !== undefined;
  return {
    requests: {
      planned,
      done: done.length,
      failed: of('failed').length,
      interrupted: of('interrupted').length,
    },
    failures: failuresOf(of('failed')),
    durationMs,
    mostRunning,
    ...withoutAbsent(spreads),
    requestsPerSecond: perSecond(done.length),
    outputTokensPerSecond: perSecond(outputTokens),
    totalTokensPerSecond: perSecond(promptTokens + outputTokens),
    promptTokens,
    outputTokens,
    countedByServer: done.every((record) => record.countedBy === 'usage'),
    ...(events > 0 && { tokensPerEvent: textTokens / events }),
    otherOutputLength: done.filter((record) => record.outputTokens !== record.asked.outputTokens).length,
    otherPromptLength: done.filter(
      ({ promptTokens: counted, asked: { promptTokens: wanted } }) =>
        counted !== undefined && wanted !== undefined && counted !== wanted,
    ).length,
    withoutText: done.filter((record) => !hasText(record)).length,
    ...(asked && { goodput: { objectives, good, requestsPerSecond: perSecond(good) } }),
  };
}

/** Mean milliseconds per output token after the first; undefined for an answer of one token or without text. */
export function tpotOf(record: RequestRecord): number | undefined {
  if (!hasText(record) || record.outputTokens < 2) return undefined;
  return record.textMs / (record.outputTokens - 1);
}

/** An answer without text has no first token that could be in time. */
export function isGood(record: RequestRecord, { ttftMs, itlMs }: Objectives): boolean {
  if (record.outcome !== 'done') return false;
  if (ttftMs !== undefined && (record.firstTokenMs ?? Infinity) > ttftMs) return false;
  if (itlMs === undefined) return true;
  return hasText(record) && (tpotOf(record) ?? 0) <= itlMs;
}

function hasText(record: RequestRecord): boolean {
  return record.firstTokenMs !== undefined;
}

/** Records without a failure are passed over. */
export function failuresOf(failed: readonly RequestRecord[]): FailureCount[] {
  const byCode = new Map<string, FailureCount>();
  for (const { failure } of failed) {
    if (!failure) continue;
    const known = byCode.get(failure.code);
    byCode.set(failure.code, { ...(known ?? failure), count: (known?.count ?? 0) + 1 });
  }
  return [...byCode.values()].sort((a, b) => b.count - a.count);
}

function withoutAbsent<T extends object>(fields: T): { [K in keyof T]?: NonNullable<T[K]> } {
  const present = Object.entries(fields).filter(([, value]) => value !== undefined);
  return Object.fromEntries(present) as { [K in keyof T]?: NonNullable<T[K]> };
}
