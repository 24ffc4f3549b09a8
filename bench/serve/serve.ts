/** pd-bench serve: what clients of a server see under load. */
import { setMaxListeners } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { PdError } from '../../src/errors.ts';
import { monotonicMs } from '../measure/machine.ts';
import type { Progress } from '../measure/progress.ts';
import { type Arrival, type Clock, runLoad, type Send } from './load.ts';
import { makePlan, type Plan, type PlanOptions } from './plan.ts';
import type { RequestRecord } from './record.ts';
import { sendRequest } from './send.ts';
import { type Objectives, type ServeSummary, summarize } from './summary.ts';
import { Target, type TargetOptions } from './target.ts';

export interface ServeOptions extends TargetOptions, PlanOptions {
  readonly arrival: Arrival;
  readonly timeoutMs: number;
  readonly objectives: Objectives;
}

export interface ServeResult {
  readonly url: string;
  readonly model: string;
  readonly sizedBy: Plan['sizedBy'];
  readonly interrupted: boolean;
  readonly summary: ServeSummary;
  readonly records: readonly RequestRecord[];
}

export interface ServeSurroundings {
  /** When aborted: stops, and returns the results so far. */
  readonly signal: AbortSignal;
  readonly progress: Progress;
  readonly clock?: Clock;
}

/** Between two updates of the progress bar, milliseconds. */
const PROGRESS_MS = 100;
/** Warm-up requests in flight, if the load is a rate. */
const WARM_UP_WIDTH = 4;

export const REAL_CLOCK: Clock = {
  now: monotonicMs,
  sleepUntil: async (atMs, signal) => {
    try {
      await sleep(Math.max(0, atMs - monotonicMs()), undefined, { signal });
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  },
};

/**
 * Asks for the model, builds the prompts, warms up and runs. Throws what prevents a start: a server that is not there, or a warm-up of
 * which no request succeeds. Once it runs, failures are results.
 */
export async function serve(options: ServeOptions, surroundings: ServeSurroundings): Promise<ServeResult> {
  const { signal, progress, clock = REAL_CLOCK } = surroundings;
  setMaxListeners(0, signal); // one per request in flight
  const target = await Target.open(options, signal);
  try {
    const plan = await makePlan(options, target, signal, (done, total) =>
      progress.say('prompts made', done, total),
    );
    const send: Send = (request, startMs, stop) =>
      sendRequest(
        { target, endpoint: options.endpoint, timeoutMs: options.timeoutMs, clock },
        request,
        startMs,
        stop,
      );
    const common = { seed: options.seed, send, clock, signal };
    await warmUp(options, plan, common, progress);
    signal.throwIfAborted();

    let shownAt = -Infinity;
    const result = await runLoad({
      ...common,
      requests: plan.requests,
      arrival: options.arrival,
      onChange: ({ running, ended, failed }) => {
        const now = clock.now();
        if (now - shownAt < PROGRESS_MS) return;
        shownAt = now;
        progress.say(
          `${running} in flight${failed > 0 ? `, ${failed} failed` : ''}`,
          ended,
          options.numRequests,
        );
      },
    });
    return {
      url: target.url,
      model: target.model,
      sizedBy: plan.sizedBy,
      interrupted: signal.aborted,
      summary: summarize(result, options.numRequests, options.objectives),
      records: result.records,
    };
  } finally {
    progress.end();
    await target.close();
  }
}

/** Opens connections, and lets the server compile, capture and allocate what it does on first use. */
async function warmUp(
  options: ServeOptions,
  plan: Plan,
  common: { seed: number; send: Send; clock: Clock; signal: AbortSignal },
  progress: Progress,
): Promise<void> {
  if (plan.warmUp.length === 0) return;
  const width = options.arrival.kind === 'concurrency' ? options.arrival.width : WARM_UP_WIDTH;
  const { records } = await runLoad({
    ...common,
    requests: plan.warmUp,
    arrival: { kind: 'concurrency', width },
    onChange: ({ ended }) => progress.say('warm-up', ended, plan.warmUp.length),
  });
  if (common.signal.aborted || records.some((record) => record.outcome === 'done')) return;
  const { code, message } = records[0]!.failure!;
  throw new PdError(
    'UPSTREAM_FAILED',
    `none of ${records.length} warm-up requests succeeded; the first: ${code}: ${message}`,
  );
}
