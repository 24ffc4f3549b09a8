/** Sends requests as planned and records the outcome of each. Pure, given a clock and a sender. */
import { arrivalTimes } from './lengths.ts';
import type { PlannedRequest, RequestRecord } from './record.ts';

export type Arrival =
  /** That many a second on average, regardless of the answers. */
  | { readonly kind: 'rate'; readonly perSecond: number }
  /** That many in flight at all times: the next is sent when one has ended. */
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
  /** When aborted: nothing more is sent, and requests in flight are interrupted. */
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
  /** For a rate: how much later than planned each request was sent, which is the benchmark's own lateness. */
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
    const inFlight: Promise<void>[] = [];
    const times = arrivalTimes(arrival.perSecond, requests.length, options.seed);
    for (const [i, request] of requests.entries()) {
      const due = startMs + times[i]!;
      if (clock.now() < due) await clock.sleepUntil(due, signal);
      if (signal.aborted) break;
      lateMs.push(Math.max(0, clock.now() - due));
      inFlight.push(one(request));
    }
    await Promise.all(inFlight);
  } else {
    let next = 0;
    const lane = async () => {
      while (next < requests.length && !signal.aborted) await one(requests[next++]!);
    };
    await Promise.all(Array.from({ length: Math.min(arrival.width, requests.length) }, lane));
  }
  return { records, durationMs: endMs - startMs, lateMs, mostRunning };
}
