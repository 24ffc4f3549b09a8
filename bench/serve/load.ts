/** Sends requests as the plan says and keeps what comes of each. Pure but for what it is given: clock and sender. */
import { arrivalTimes } from './lengths.ts';
import type { PlannedRequest, RequestRecord } from './record.ts';

export type Arrival =
  /** On average so many a second, whatever the answers do. */
  | { readonly kind: 'rate'; readonly perSecond: number }
  /** So many under way at all times: the next is sent when one has ended. */
  | { readonly kind: 'concurrency'; readonly width: number };

/** Milliseconds. */
export interface Clock {
  now(): number;
  /** Resolves at `atMs`, or once the signal is aborted. */
  sleepUntil(atMs: number, signal: AbortSignal): Promise<void>;
}

/** Settles soon after `signal` is aborted, and never rejects. `sentMs` counts from `startMs`. */
export type Send = (request: PlannedRequest, startMs: number, signal: AbortSignal) => Promise<RequestRecord>;

export interface LoadOptions {
  readonly requests: readonly PlannedRequest[];
  readonly arrival: Arrival;
  /** Of the arrivals. */
  readonly seed: number;
  readonly send: Send;
  readonly clock: Clock;
  /** Aborted: nothing more is sent, and what is under way is interrupted. */
  readonly signal: AbortSignal;
  readonly onChange?: (state: LoadState) => void;
}

export interface LoadState {
  readonly running: number;
  readonly ended: number;
  readonly failed: number;
}

export interface LoadResult {
  /** In the order in which they ended. */
  readonly records: readonly RequestRecord[];
  /** From the first request sent to the end of the last answer, or to the interruption. */
  readonly durationMs: number;
  /** How much later than planned each request left, of a rate: the benchmark's own lateness. */
  readonly lateMs: readonly number[];
  readonly mostRunning: number;
}

export async function runLoad(options: LoadOptions): Promise<LoadResult> {
  const { requests, arrival, clock, signal } = options;
  const records: RequestRecord[] = [];
  const lateMs: number[] = [];
  let running = 0;
  let failed = 0;
  let mostRunning = 0;
  const startMs = clock.now();
  let endMs = startMs;

  const one = async (request: PlannedRequest): Promise<void> => {
    mostRunning = Math.max(mostRunning, ++running);
    const record = await options.send(request, startMs, signal);
    running--;
    endMs = clock.now();
    records.push(record);
    if (record.outcome === 'failed') failed++;
    options.onChange?.({ running, ended: records.length, failed });
  };

  if (arrival.kind === 'rate') {
    const underWay: Promise<void>[] = [];
    const times = arrivalTimes(arrival.perSecond, requests.length, options.seed);
    for (const [i, request] of requests.entries()) {
      const due = startMs + times[i]!;
      if (clock.now() < due) await clock.sleepUntil(due, signal);
      if (signal.aborted) break;
      lateMs.push(Math.max(0, clock.now() - due));
      underWay.push(one(request));
    }
    await Promise.all(underWay);
  } else {
    let next = 0;
    const lane = async () => {
      while (next < requests.length && !signal.aborted) await one(requests[next++]!);
    };
    await Promise.all(Array.from({ length: Math.min(arrival.width, requests.length) }, lane));
  }
  return { records, durationMs: endMs - startMs, lateMs, mostRunning };
}
