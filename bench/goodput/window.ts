/**
 * The time of one rate. Pure. Arrivals are open-loop and go on from the first to the last moment, so that every counted request meets the
 * same load from its sending to its end:
 *
 *   |---- lead ----|-------- window: counted --------|---- until the last counted one has ended, `drain` at most ----|
 */
import { arrivalTimes } from '../serve/lengths.ts';

export interface Phases {
  readonly leadMs: number;
  readonly windowMs: number;
  readonly drainMs: number;
}

export interface Window {
  /** Requests to have ready. */
  readonly requests: number;
  /** Those from `first` up to, without, `end` count. */
  readonly first: number;
  readonly end: number;
}

export function windowOf(perSecond: number, phases: Phases, seed: number): Window {
  const { leadMs, windowMs, drainMs } = phases;
  const whole = leadMs + windowMs + drainMs;
  let count = 16;
  // the beginning of a longer series is the shorter one
  for (let last = 0; last < whole; ) {
    count *= 2;
    last = arrivalTimes(perSecond, count, seed).at(-1)!;
  }
  const times = arrivalTimes(perSecond, count, seed);
  const before = (ms: number) => times.filter((at) => at < ms).length;
  return { requests: before(whole), first: before(leadMs), end: before(leadMs + windowMs) };
}
