/** One rate: requests that arrive whatever becomes of those before them, and how many of them were good. */
import { setMaxListeners } from 'node:events';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { type Spread, spreadOf } from '../measure/statistics.ts';
import { runLoad, type Send } from '../serve/load.ts';
import type { PlannedRequest, RequestRecord } from '../serve/record.ts';
import { REAL_CLOCK } from '../serve/serve.ts';
import { type FailureCount, failuresOf, tpotOf } from '../serve/summary.ts';
import { type BoundResult, type Bounds, judge, type MissedRequest, missedOf } from './bounds.ts';
import { type LongGaps, longGaps, tokenGaps } from './gaps.ts';
import type { Subject } from './subject.ts';
import { type Phases, windowOf } from './window.ts';

export interface RateOptions {
  readonly bounds: Bounds;
  readonly phases: Phases;
  readonly promptTokens: number;
  readonly outputTokens: number;
  /** Of arrivals. */
  readonly seed: number;
  /** Of the words. */
  readonly textSeed: number;
}

/** The load generator itself: what it was late by, and how busy. */
export interface GeneratorLag {
  /** How much later than planned requests were sent, ms. */
  readonly sentLateMs?: Spread;
  /** How late a timer of 1 ms fired, ms: every time that is measured here may be off by so much. */
  readonly timerLateMs: { readonly p50: number; readonly p99: number; readonly max: number };
  /** Share of one core. */
  readonly cpu: number;
}

export interface RateResult {
  /** Requests per second. */
  readonly asked: number;
  readonly seconds: number;
  /** Requests that arrived in that time; all numbers are of them. */
  readonly counted: number;
  readonly bounds: readonly BoundResult[];
  readonly missed: readonly MissedRequest[];
  /** Milliseconds. Of all requests that got so far, those included that missed a bound or were cut off. */
  readonly ttftMs?: Spread;
  readonly itlMs?: Spread;
  readonly tpotMs?: Spread;
  readonly failures: readonly FailureCount[];
  readonly mostRunning: number;
  /** Answered in full with other lengths than asked for. */
  readonly otherLengths: number;
  readonly longGaps?: LongGaps;
  readonly generator: GeneratorLag;
}

/** What is left of an answer at the end of a run is aborted; a server that hangs ends there too. */
const SLACK_MS = 5_000;
const TIMER_MS = 1;

export async function measureRate(
  subject: Subject,
  perSecond: number,
  options: RateOptions,
  signal: AbortSignal,
): Promise<RateResult> {
  const { phases, seed, bounds } = options;
  const { leadMs, windowMs, drainMs } = phases;
  const { requests: count, first, end } = windowOf(perSecond, phases, seed);
  const requests = await plan(subject, perSecond, count, options);
  const whole = leadMs + windowMs + drainMs;
  const over = new AbortController();
  const stop = AbortSignal.any([signal, over.signal]);
  setMaxListeners(0, stop);
  const counts = ({ index }: { readonly index: number }) => index >= first && index < end;
  let left = end - first;
  const ask = subject.sender(whole + SLACK_MS);
  const send: Send = async (request, startMs, aborted) => {
    const record = await ask(request, startMs, aborted);
    if (counts(request) && --left === 0) over.abort();
    return record;
  };
  const late = monitorEventLoopDelay({ resolution: TIMER_MS });
  const timer = setTimeout(() => over.abort(), whole);
  const [cpu, began] = [process.cpuUsage(), performance.now()];
  late.enable();
  const arrival = { kind: 'rate', perSecond } as const;
  const load = await runLoad({ requests, arrival, seed, send, clock: REAL_CLOCK, signal: stop });
  late.disable();
  clearTimeout(timer);
  const used = process.cpuUsage(cpu);
  signal.throwIfAborted();

  const records = load.records.filter(counts);
  const seconds = windowMs / 1_000;
  const timerAt = (ns: number) => Math.max(0, ns / 1e6 - TIMER_MS);
  const sentLateMs = spreadOf(load.lateMs);
  return {
    asked: perSecond,
    seconds,
    counted: end - first,
    bounds: judge(records, bounds, seconds),
    missed: missedOf(records, bounds),
    ...spreads(records),
    failures: failuresOf(records),
    mostRunning: load.mostRunning,
    otherLengths: records.filter(hasOtherLength).length,
    ...present('longGaps', longGaps(load.records)),
    generator: {
      ...present('sentLateMs', sentLateMs),
      timerLateMs: {
        p50: timerAt(late.percentile(50)),
        p99: timerAt(late.percentile(99)),
        max: timerAt(late.max),
      },
      cpu: (used.user + used.system) / 1_000 / (performance.now() - began),
    },
  };
}

/** The same for every server, and other ones for each rate: none is found in a prefix cache. */
async function plan(
  subject: Subject,
  perSecond: number,
  count: number,
  { promptTokens, outputTokens, textSeed }: RateOptions,
): Promise<PlannedRequest[]> {
  const seed = textSeed + Math.round(perSecond * 1_000);
  const requests: PlannedRequest[] = [];
  for (let index = 0; index < count; index++) {
    const prompt = await subject.prompt(promptTokens, seed, index);
    requests.push({ index, prompt, promptTokens, outputTokens });
  }
  return requests;
}

export function spreads(records: readonly RequestRecord[]): Pick<RateResult, 'ttftMs' | 'itlMs' | 'tpotMs'> {
  return {
    ...present('ttftMs', spreadOf(records.flatMap(({ firstTokenMs }) => firstTokenMs ?? []))),
    ...present('itlMs', spreadOf(records.flatMap(tokenGaps))),
    ...present('tpotMs', spreadOf(records.flatMap((record) => tpotOf(record) ?? []))),
  };
}

function hasOtherLength({ outcome, promptTokens, outputTokens, asked }: RequestRecord): boolean {
  if (outcome !== 'done') return false;
  return outputTokens !== asked.outputTokens || (promptTokens ?? asked.promptTokens) !== asked.promptTokens;
}

function present<Name extends string, Value>(
  name: Name,
  value: Value | undefined,
): { readonly [N in Name]?: Value } {
  return (value === undefined ? {} : { [name]: value }) as { readonly [N in Name]?: Value };
}
