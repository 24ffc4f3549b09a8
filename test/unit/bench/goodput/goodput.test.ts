import { describe, expect, it } from 'vitest';
import { brokenOf, judge, missedOf } from '../../../../bench/goodput/bounds.ts';
import { longGaps, tokenGaps } from '../../../../bench/goodput/gaps.ts';
import { bestOf, joinParts, type SystemResult } from '../../../../bench/goodput/page.ts';
import { plotSvg } from '../../../../bench/goodput/plot.ts';
import type { RateResult } from '../../../../bench/goodput/rate.ts';
import { nextRate } from '../../../../bench/goodput/rates.ts';
import { windowOf } from '../../../../bench/goodput/window.ts';
import { arrivalTimes } from '../../../../bench/serve/lengths.ts';
import type { RequestRecord } from '../../../../bench/serve/record.ts';

/** `gaps` between tokens, the first of which came `firstMs` after it was sent. */
function record(sentMs: number, firstMs: number, gaps: readonly number[], more = {}): RequestRecord {
  const textMs = gaps.reduce((sum, gap) => sum + gap, 0);
  return {
    index: 0,
    outcome: 'done',
    sentMs,
    endToEndMs: firstMs + textMs,
    firstTokenMs: firstMs,
    textMs,
    gapsMs: gaps,
    outputTokens: gaps.length + 1,
    countedBy: 'usage',
    asked: { outputTokens: gaps.length + 1 },
    ...more,
  };
}

describe('bounds', () => {
  const fine = record(0, 400, [12, 12]);
  const late = record(5, 401, [10, 10]);
  const slow = record(9, 100, [4, 22]);
  const both = record(9, 500, [20, 20]);
  const failed = record(9, 100, [1], { outcome: 'failed', failure: { code: 'TIMEOUT', message: '' } });

  it('a request is good at the bounds, and by its mean per token; one that missed names what it broke', () => {
    const broken = [fine, late, slow, both, failed].map((one) => brokenOf(one, 400, 12));
    expect(broken).toEqual([undefined, 'first token', 'per token', 'both', 'failed']);
  });

  it('one that was cut off is judged by what came until then', () => {
    const { firstTokenMs: _, ...silent } = record(0, 0, [], { outcome: 'interrupted' });
    expect(brokenOf(silent, 400, 12)).toBe('first token');
    expect(brokenOf(record(0, 300, [30], { outcome: 'interrupted' }), 400, 12)).toBe('per token');
    expect(brokenOf(record(0, 300, [5], { outcome: 'interrupted' }), 400, 12)).toBe('failed');
  });

  it('each bound per token is evaluated from the same requests, over the time that counts', () => {
    const bounds = { ttftMs: 400, itlMs: [12, 10] };
    const results = judge([fine, late, slow, both, failed], bounds, 2);
    expect(results.map(({ good, goodPerSecond }) => [good, goodPerSecond])).toEqual([
      [1, 0.5],
      [0, 0],
    ]);
    expect(results[1]!.broke).toEqual({ 'first token': 1, 'per token': 2, both: 1, failed: 1 });
    expect(missedOf([fine, late], bounds)).toEqual([
      { index: 0, sentMs: 0, ttftMs: 400, tpotMs: 12, broke: { '10 ms': 'per token' } },
      {
        index: 0,
        sentMs: 5,
        ttftMs: 401,
        tpotMs: 10,
        broke: { '12 ms': 'first token', '10 ms': 'first token' },
      },
    ]);
  });
});

it('of a rate only arrivals within the window count, and arrivals go on behind it', () => {
  const phases = { leadMs: 1_000, windowMs: 4_000, drainMs: 2_000 };
  const { requests, first, end } = windowOf(10, phases, 3);
  const times = arrivalTimes(10, requests + 1, 3);
  expect(times[first - 1]).toBeLessThan(1_000);
  expect(times[first]).toBeGreaterThanOrEqual(1_000);
  expect(times[end - 1]).toBeLessThan(5_000);
  expect(times[end]).toBeGreaterThanOrEqual(5_000);
  expect(times[requests - 1]).toBeLessThan(7_000);
  expect(times[requests]).toBeGreaterThanOrEqual(7_000);
});

describe('the next rate', () => {
  /** Measures until it is told to stop. */
  const search = (first: number, ...curves: ((asked: number) => number)[]) => {
    const tried = [{ asked: first, good: curves.map((curve) => curve(first)) }];
    for (let rate = nextRate(tried); rate !== undefined && tried.length < 30; rate = nextRate(tried)) {
      tried.push({ asked: rate, good: curves.map((curve) => curve(rate!)) });
    }
    return tried;
  };
  /** All good up to `limit`, fewer and fewer beyond. */
  const upTo = (limit: number) => (asked: number) => Math.max(0, Math.min(asked, 3 * limit - 2 * asked));

  it.each([2, 14, 60])('finds the peak from %d', (first) => {
    const tried = search(first, upTo(11));
    expect(tried.length).toBeLessThan(30);
    const best = Math.max(...tried.map(({ good }) => good[0]!));
    expect(best).toBeGreaterThan(0.93 * 11);
  });

  it('finds the peaks of two bounds in one search, and tries no rate twice', () => {
    const tried = search(14, upTo(13), upTo(6));
    expect(new Set(tried.map(({ asked }) => asked)).size).toBe(tried.length);
    expect(Math.max(...tried.map(({ good }) => good[0]!))).toBeGreaterThan(0.93 * 13);
    expect(Math.max(...tried.map(({ good }) => good[1]!))).toBeGreaterThan(0.93 * 6);
  });

  it('does not try a rate at which all requests together are fewer than were good already', () => {
    expect(nextRate([{ asked: 10, good: [9.9] }])).toBeGreaterThan(10);
  });
});

describe('long gaps', () => {
  const steady = new Array<number>(50).fill(10);
  const withOne = (at: number, ms: number) => steady.map((gap, i) => (i === at ? ms : gap));

  it('tells a batch that stood still from one stream that did', () => {
    const batch = [0, 1, 2].map((i) => record(i, 100, withOne(20, 25)));
    expect(longGaps(batch)).toMatchObject({
      gaps: 150,
      beyondMs: 15,
      shared: 3,
      alone: 0,
      joined: 0,
      meanMs: 25,
    });
    const single = [record(0, 100, withOne(20, 25)), record(1, 100, steady), record(2, 100, steady)];
    expect(longGaps(single)).toMatchObject({ shared: 0, alone: 1 });
  });

  it('tells whether somebody got a first token meanwhile, and the gap in which one joins', () => {
    const batch = [0, 1, 2].map((i) => record(i, 100, withOne(20, 25)));
    const joining = record(200, 112, [18, ...steady]);
    expect(longGaps([...batch, joining])).toMatchObject({ sharedWithFirstToken: 3, joined: 1, shared: 0 });
  });

  it('an event of several tokens, where the server says so, is as many short gaps', () => {
    const held = record(0, 100, [10, 30], { ids: [[1], [2], [3, 4, 5]], outputTokens: 5 });
    expect(tokenGaps(held)).toEqual([10, 10, 10, 10]);
    expect(tokenGaps(record(0, 100, [10, 30]))).toEqual([10, 30]);
    expect(longGaps([held])).toMatchObject({ joined: 0, alone: 0, shared: 0 });
  });
});

it('parts of several calls become one page: the later measurement of a rate stands', () => {
  const rate = (asked: number, good: number) =>
    ({ asked, bounds: [{ itlMs: 12, good, goodPerSecond: good, broke: {} }] }) as unknown as RateResult;
  const system = (rates: readonly RateResult[], more = {}): SystemResult => ({
    ...{ name: 'pair', kind: 'pair', about: '', rates },
    ...more,
  });
  const part = (systems: readonly SystemResult[]) =>
    ({ seconds: 10, systems, problems: [], leftOut: [] }) as unknown as Parameters<
      typeof joinParts
    >[0][number];
  const turns = { answered: 1 } as unknown as NonNullable<SystemResult['turns']>;
  const { systems, seconds } = joinParts([
    part([system([rate(14, 12), rate(10, 9)], { turns })]),
    part([system([rate(14, 13)])]),
  ]);
  expect(seconds).toBe(20);
  expect(systems).toHaveLength(1);
  expect(systems[0]!.turns).toBe(turns);
  expect(systems[0]!.rates.map(({ asked }) => asked)).toEqual([10, 14]);
  expect(bestOf(systems, 0)).toMatchObject({ perSecond: 13, rate: { asked: 14 } });
});

it('the plot is well-formed, whatever names and values are', () => {
  const lines = [
    {
      name: 'a <pair> & "more"',
      main: true,
      points: [
        { asked: 8, good: [8, 3] },
        { asked: 14, good: [12.5, 0] },
      ],
    },
    { name: 'none', points: [] },
    { name: 'zero', points: [{ asked: 0.5, good: [0, 0] }] },
  ];
  const svg = plotSvg('goodput', ['12 ms', '10 ms'], lines);
  const open: string[] = [];
  for (const [, close, name, self] of svg.matchAll(/<(\/?)([a-z]+)(?:\s+[\w:-]+="[^"<&]*")*\s*(\/?)>/g)) {
    if (close) expect(open.pop()).toBe(name);
    else if (!self) open.push(name!);
  }
  expect(open).toEqual([]);
  // nothing but elements, and text without markup
  expect(svg.replaceAll(/<[^<>]*>/g, '')).not.toMatch(/[<>]|&(?!amp;|lt;|gt;|quot;)/);
  expect(svg).not.toContain('NaN');
  expect(svg.match(/<polyline/g)).toHaveLength(6);
  expect(plotSvg('nothing', ['12 ms'], [])).toContain('</svg>');
});
