/** Compares two answers to one request token by token, and judges their differences. Pure. */
import type { LoadRequest } from './loads.ts';

/** The first token at which two answers differ. */
export interface Parting {
  readonly request: LoadRequest;
  /** What both generated before. */
  readonly before: readonly number[];
  readonly undivided: number;
  readonly pair: number;
}

/** Undefined if they are equal. If one is a prefix of the other, -1 stands for the missing token. */
export function partingOf(
  request: LoadRequest,
  undivided: readonly number[],
  pair: readonly number[],
): Parting | undefined {
  const length = Math.max(undivided.length, pair.length);
  for (let at = 0; at < length; at++) {
    if (undivided[at] === pair[at]) continue;
    const before = undivided.slice(0, at);
    return { request, before, undivided: undivided[at] ?? -1, pair: pair[at] ?? -1 };
  }
  return undefined;
}

/** For one generated token: the log-probabilities of the likeliest, by token. */
export type TopLogprobs = ReadonlyMap<number, number>;

export interface Generated {
  readonly tokens: readonly number[];
  readonly top: readonly TopLogprobs[];
}

/**
 * By how much the gap between the two likeliest tokens differs between two runs, at each position up to which both generated the same.
 * Positions where the second run does not report both tokens are left out.
 */
export function gapChanges(one: Generated, other: Generated): number[] {
  const changes: number[] = [];
  for (const [at, top] of one.top.entries()) {
    const [first, second] = [...top.keys()];
    const there = other.top[at];
    if (first !== undefined && second !== undefined && there) {
      const gap = gapOf(top, first, second);
      const again = gapOf(there, first, second);
      if (gap !== undefined && again !== undefined) changes.push(Math.abs(gap - again));
    }
    if (one.tokens[at] !== other.tokens[at]) break;
  }
  return changes;
}

/** Log-probability of `first` minus that of `second`; undefined if one of them is not reported. */
export function gapOf(top: TopLogprobs, first: number, second: number): number | undefined {
  const [a, b] = [top.get(first), top.get(second)];
  return a === undefined || b === undefined ? undefined : a - b;
}
