/** When a pair's answer counts as the undivided worker's. */
import { describe, expect, test } from 'vitest';
import { gapChanges, gapOf, partingOf, type TopLogprobs } from '../../../bench/pair/compare.ts';
import { limitsOf, makeLoads } from '../../../bench/pair/loads.ts';

const request = { prompt: [1, 2], maxTokens: 4, temperature: 0, seed: 0 };
const top = (...entries: [number, number][]): TopLogprobs => new Map(entries);

describe('partingOf', () => {
  test('finds the first token that differs, and a missing one', () => {
    expect(partingOf(request, [5, 6, 7], [5, 6, 7])).toBeUndefined();
    expect(partingOf(request, [5, 6, 7], [5, 8, 7])).toMatchObject({ before: [5], undivided: 6, pair: 8 });
    expect(partingOf(request, [5, 6], [5, 6, 7])).toMatchObject({ before: [5, 6], undivided: -1, pair: 7 });
  });
});

describe('gapChanges', () => {
  const one = { tokens: [5, 6], top: [top([5, -0.5], [9, -1]), top([6, -0.1], [7, -0.2])] };

  test('compares the two likeliest tokens by name, also where they have changed places', () => {
    const other = { tokens: [5, 7], top: [top([5, -0.5], [9, -1.25]), top([7, -0.1], [6, -0.2])] };
    const [first, second] = gapChanges(one, other);
    expect(first).toBeCloseTo(0.25);
    expect(second).toBeCloseTo(0.2);
  });

  test('ends where the answers part, and leaves out what is not told', () => {
    const other = { tokens: [9, 6], top: [top([9, -0.4], [5, -0.6]), top([6, -9], [7, -0.2])] };
    expect(gapChanges(one, other)).toHaveLength(1);
    expect(gapChanges(one, { tokens: [5, 6], top: [top([5, -0.5], [4, -1]), one.top[1]!] })).toEqual([0]);
    expect(gapOf(top([5, -1]), 5, 6)).toBeUndefined();
  });
});

test.each([false, true])(
  'loads fit the workers they are for, and are what they are called; small %s',
  (small) => {
    const { maxModelLen, maxNumBatchedTokens, numBlocks, maxNumSeqs } = limitsOf(small);
    const loads = makeLoads({ vocab: 100, sampled: true, small, growTo: 160 });
    for (const { prompt, maxTokens } of loads.flatMap(({ requests }) => requests)) {
      expect(prompt.length + maxTokens).toBeLessThanOrEqual(maxModelLen);
      expect(prompt.every((id) => id >= 0 && id < 100)).toBe(true);
    }
    const load = (effect: string) => loads.find((one) => one.effect === effect)!;
    const longest = Math.max(...load('chunks').requests.map(({ prompt }) => prompt.length));
    expect(longest).toBeGreaterThan(maxNumBatchedTokens);
    const blocks = ({ prompt, maxTokens }: typeof request) => Math.ceil((prompt.length + maxTokens) / 16);
    const wanted = load('preemption').requests.reduce(
      (sum, one) => sum + blocks({ ...request, ...one, prompt: [...one.prompt] }),
      0,
    );
    expect(wanted).toBeGreaterThan(numBlocks);
    expect(loads[1]!.width).toBe(maxNumSeqs);
    // none but those that share a beginning on purpose do: prefix caches would change what is moved
    const heads = loads.flatMap(({ effect, requests }) =>
      effect === 'prefix hits' ? [] : requests.map(({ prompt }) => prompt.slice(0, 4).join()),
    );
    expect(new Set(heads).size).toBe(heads.length);
  },
);
