/** Rates of one server, one after another: those given, then where its best lies. */
import { measureRate, type RateOptions, type RateResult } from './rate.ts';
import { nextRate } from './rates.ts';
import type { Subject } from './subject.ts';

export interface SweepOptions extends RateOptions {
  /** Measured first. */
  readonly rates: readonly number[];
  /** Rates in all, the first ones included. */
  readonly runs: number;
  /** What an earlier sweep of this system has found. */
  readonly before?: readonly RateResult[];
  /** `performance.now()` after which no rate is begun that would end later. */
  readonly until: number;
  readonly onRate?: (result: RateResult) => void;
}

/** Between two rates: requests that were aborted leave the server. */
const PAUSE_MS = 500;

/** As many as there is time for. Stops early at `signal`, with what has been measured. */
export async function sweep(
  subject: Subject,
  options: SweepOptions,
  signal: AbortSignal,
): Promise<RateResult[]> {
  const { rates, runs, until, phases, onRate, before = [] } = options;
  const results: RateResult[] = [];
  const longest = phases.leadMs + phases.windowMs + phases.drainMs + PAUSE_MS;
  while (results.length < runs && performance.now() + longest < until && !signal.aborted) {
    const tried = [...before, ...results].map(({ asked, bounds }) => ({
      asked,
      good: bounds.map(({ goodPerSecond }) => goodPerSecond),
    }));
    const rate = rates[results.length] ?? nextRate(tried);
    if (rate === undefined) break;
    try {
      const result = await measureRate(subject, rate, options, signal);
      results.push(result);
      onRate?.(result);
    } catch (error) {
      if (signal.aborted) break;
      throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
  }
  return results;
}
