/** Which rate to try next, to find the most good requests per second. Pure. */

/** A rate that was measured. */
export interface Tried {
  /** Requests per second that were asked for. */
  readonly asked: number;
  /** Good ones per second, by bound. */
  readonly good: readonly number[];
}

/** Above the highest rate tried, where that is the best. */
const UP = 1.25;
/** Rates nearer than this factor to each other are as good as the same: a window has a hundred or two hundred requests. */
const CLOSE = 1.08;

/**
 * Undefined once the best rate of every bound lies between close neighbours. Around the best of each bound the wider gap is halved; of
 * several bounds the one with the widest gap is served. A rate at which even good requests alone could not be more is not tried.
 */
export function nextRate(tried: readonly Tried[]): number | undefined {
  const bounds = tried[0]?.good.length ?? 0;
  let next: { readonly rate: number; readonly gap: number } | undefined;
  for (let bound = 0; bound < bounds; bound++) {
    const candidate = nextFor(tried, bound);
    if (candidate && (!next || candidate.gap > next.gap)) next = candidate;
  }
  return next && rounded(next.rate);
}

function nextFor(tried: readonly Tried[], bound: number): { rate: number; gap: number } | undefined {
  const ascending = [...tried].sort((a, b) => a.asked - b.asked);
  const goods = ascending.map(({ good }) => good[bound]!);
  const most = Math.max(...goods);
  const at = goods.indexOf(most);
  const { asked } = ascending[at]!;
  const above = ascending[at + 1]?.asked;
  const below = ascending[at - 1]?.asked;
  const candidates = [
    above === undefined ? { rate: asked * UP, gap: UP ** 2 } : halved(asked, above),
    below === undefined ? { rate: asked / UP, gap: UP ** 2 } : halved(below, asked),
  ];
  return candidates
    .filter(
      ({ rate, gap }) => gap > CLOSE && rate > most && !tried.some((one) => one.asked === rounded(rate)),
    )
    .sort((a, b) => b.gap - a.gap)[0];
}

function halved(from: number, to: number): { rate: number; gap: number } {
  return { rate: Math.sqrt(from * to), gap: to / from };
}

function rounded(rate: number): number {
  return rate >= 10 ? Math.round(rate * 2) / 2 : Math.round(rate * 10) / 10;
}
