/** How many tokens prompts and answers have: one number, or drawn anew for each request. Pure. */

import type { Kind } from '../../src/config/kinds.ts';
import { uniform } from '../../src/model/random.ts';
import { z } from '../../src/zod.ts';

export type Length =
  | { readonly kind: 'fixed'; readonly tokens: number }
  /** Uniform, both ends included. */
  | { readonly kind: 'range'; readonly from: number; readonly to: number }
  /** `sigma` is the standard deviation of the logarithm; larger draws are cut at `max`. */
  | { readonly kind: 'lognormal'; readonly median: number; readonly sigma: number; readonly max: number };

/** What is drawn: each from its own random numbers, so that changing one option does not affect the other draws. */
export type Draw = 'arrival' | 'prompt-length' | 'output-length';
const STREAMS: Readonly<Record<Draw, number>> = { arrival: 0, 'prompt-length': 2, 'output-length': 4 };

const MAX_TOKENS = 10_000_000;
/** Default `max` of a log-normal length, in medians. */
const DEFAULT_CUT = 16;

const ALLOWED =
  'tokens: 512, 128-1024 (uniform), or lognormal:MEDIAN,SIGMA[,MAX] such as lognormal:256,0.6,4096';

export function lengthKind(): Kind<Length> {
  const schema = z.union([z.string(), z.number()]).transform((raw, context): Length => {
    const length = parseLength(String(raw).trim());
    if (length) return length;
    context.addIssue({ code: 'custom', message: `expected ${ALLOWED}` });
    return z.NEVER;
  });
  return { schema, allowed: ALLOWED, argument: 'tokens', render: formatLength };
}

export function parseLength(text: string): Length | undefined {
  const tokens = (digits: string | undefined) => {
    const value = Number(digits);
    return value >= 1 && value <= MAX_TOKENS ? value : undefined;
  };
  const plain = /^(\d+)(?:-(\d+))?$/.exec(text);
  if (plain) {
    const from = tokens(plain[1]);
    if (from === undefined) return undefined;
    if (plain[2] === undefined) return { kind: 'fixed', tokens: from };
    const to = tokens(plain[2]);
    return to === undefined || to < from ? undefined : { kind: 'range', from, to };
  }
  const match = /^lognormal:(\d+),(\d+(?:\.\d+)?)(?:,(\d+))?$/.exec(text);
  const median = tokens(match?.[1]);
  if (!match || median === undefined) return undefined;
  const max = match[3] === undefined ? median * DEFAULT_CUT : tokens(match[3]);
  return max === undefined || max < median
    ? undefined
    : { kind: 'lognormal', median, sigma: Number(match[2]), max };
}

export function formatLength(length: Length): string {
  switch (length.kind) {
    case 'fixed':
      return String(length.tokens);
    case 'range':
      return `${length.from}-${length.to}`;
    case 'lognormal':
      return `lognormal:${length.median},${length.sigma},${length.max}`;
  }
}

/** At least 1. The same seed, draw and index give the same number. */
export function drawLength(length: Length, seed: number, draw: Draw, index: number): number {
  const random = uniform(seed, STREAMS[draw], index);
  switch (length.kind) {
    case 'fixed':
      return length.tokens;
    case 'range':
      return length.from + Math.floor(random * (length.to - length.from + 1));
    case 'lognormal': {
      // Box-Muller; 1 - random is never 0
      const angle = 2 * Math.PI * uniform(seed, STREAMS[draw] + 1, index);
      const normal = Math.sqrt(-2 * Math.log(1 - random)) * Math.cos(angle);
      return Math.min(length.max, Math.max(1, Math.round(length.median * Math.exp(length.sigma * normal))));
    }
  }
}

/**
 * When each of `count` requests is sent, in milliseconds after the first: a Poisson process of `perSecond`, whose gaps are exponential
 * and do not depend on answers.
 */
export function arrivalTimes(perSecond: number, count: number, seed: number): number[] {
  const times: number[] = [];
  let at = 0;
  for (let i = 0; i < count; i++) {
    times.push(at);
    at += (-Math.log(1 - uniform(seed, STREAMS.arrival, i)) / perSecond) * 1_000;
  }
  return times;
}
