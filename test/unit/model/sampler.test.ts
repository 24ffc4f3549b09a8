import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { uniform } from '../../../src/model/random.ts';
import { GREEDY, logprobOf, sample } from '../../../src/model/sampler.ts';
import type { SamplingParams } from '../../../src/scheduler/types.ts';

const pick = (logits: number[], params: Partial<SamplingParams> = {}, outputPosition = 0, index = 0) =>
  sample(Float32Array.from(logits), { params: { ...GREEDY, ...params }, outputPosition, index });

const anyLogits = fc.array(fc.float({ min: -20, max: 20, noNaN: true }), { minLength: 1, maxLength: 60 });

/** Ids by probability, ties by id, and their softmax at `temperature`. */
function ranked(logits: readonly number[], temperature: number): { id: number; share: number }[] {
  const weights = logits.map((logit) => Math.exp((Math.fround(logit) - Math.max(...logits)) / temperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights
    .map((weight, id) => ({ id, weight, share: weight / total }))
    .sort((a, b) => b.weight - a.weight || a.id - b.id);
}

describe('sampling', () => {
  it('takes the highest logit, the lowest id where two are equal', () => {
    expect(pick([1, 5, 2, 5]).token).toBe(1);
    expect(pick([-3, -3]).token).toBe(0);
  });

  it('bans stop tokens before min_tokens, greedy and drawn', () => {
    const params = { minTokens: 2, stopTokenIds: [1, 99] };
    expect(pick([1, 9, 2], params, 1).token).toBe(2);
    expect(pick([1, 9, 2], params, 2).token).toBe(1);
    for (let position = 0; position < 50; position++) {
      expect(pick([1, 9, 2], { ...params, minTokens: 50, temperature: 1 }, position).token).not.toBe(1);
    }
  });

  it('draws from the top k alone', () => {
    fc.assert(
      fc.property(anyLogits, fc.integer({ min: 1, max: 10 }), fc.nat(), (logits, topK, seed) => {
        const allowed = ranked(logits, 1)
          .slice(0, topK)
          .map(({ id }) => id);
        expect(allowed).toContain(pick(logits, { temperature: 1, topK, seed }).token);
      }),
    );
  });

  it('draws from the nucleus alone: every token before the drawn one leaves top-p unfilled', () => {
    fc.assert(
      fc.property(
        anyLogits,
        fc.double({ min: 0.05, max: 0.99, noNaN: true }),
        fc.nat(),
        (logits, topP, seed) => {
          const order = ranked(logits, 0.8);
          const at = order.findIndex(({ id }) => id === pick(logits, { temperature: 0.8, topP, seed }).token);
          const before = order.slice(0, at).reduce((sum, { share }) => sum + share, 0);
          expect(before).toBeLessThan(topP + 1e-9);
        },
      ),
    );
  });

  it('a tiny top-p is greedy', () => {
    expect(pick([1, 2, 9, 3], { temperature: 2, topP: 1e-9, seed: 5 }).token).toBe(2);
  });

  it('draws each token as often as its probability says', () => {
    const counts = [0, 0, 0];
    const draws = 6000;
    for (let position = 0; position < draws; position++) {
      counts[pick([0, Math.log(2), Math.log(3)], { temperature: 1, seed: 11 }, position).token]!++;
    }
    counts.forEach((count, id) => {
      expect(count / draws).toBeCloseTo((id + 1) / 6, 1);
    });
  });

  it('hangs on seed, completion and position alone', () => {
    const logits = Array.from({ length: 200 }, (_, i) => Math.sin(i));
    const text = (seed: number, index: number) =>
      Array.from(
        { length: 40 },
        (_, position) => pick(logits, { temperature: 1, seed }, position, index).token,
      ).join();
    expect(text(7, 0)).toBe(text(7, 0));
    expect(new Set([text(7, 0), text(8, 0), text(7, 1), text(2 ** 40 + 7, 0), text(-7, 0)]).size).toBe(5);
  });

  it('refuses logits that are no numbers', () => {
    expect(() => pick([1, Number.NaN, 2])).toThrow(/no usable distribution/);
    expect(() => pick([Number.NEGATIVE_INFINITY])).toThrow(/no usable distribution/);
  });

  it('gives log-probabilities of the raw logits, whatever is banned or cooled', () => {
    const logits = [0, Math.log(2), Math.log(5)];
    const { logprob } = pick(logits, { logprobs: 2, temperature: 0, minTokens: 1, stopTokenIds: [2] });
    expect(logprob?.token).toBe(1);
    expect(Math.exp(logprob!.logprob)).toBeCloseTo(2 / 8, 6);
    expect(logprob!.top.map(({ token }) => token)).toEqual([2, 1]);
    expect(Math.exp(logprob!.top[0]!.logprob)).toBeCloseTo(5 / 8, 6);
    expect(pick(logits, { logprobs: 0 }).logprob?.top).toEqual([]);
    expect(pick(logits).logprob).toBeUndefined();
  });

  it('gives probabilities that add up to one', () => {
    fc.assert(
      fc.property(anyLogits, (logits) => {
        const { top } = logprobOf(Float32Array.from(logits), 0, logits.length);
        expect(top.reduce((sum, { logprob }) => sum + Math.exp(logprob), 0)).toBeCloseTo(1, 6);
        expect(new Set(top.map(({ token }) => token)).size).toBe(logits.length);
      }),
    );
  });
});

describe('uniform', () => {
  it('fills [0, 1) evenly over positions, seeds and completions', () => {
    const buckets = new Array<number>(10).fill(0);
    for (let i = 0; i < 3000; i++) {
      for (const value of [uniform(42, 0, i), uniform(i, 0, 0), uniform(42, i, 0)]) {
        expect(value).toBeGreaterThanOrEqual(0);
        expect(value).toBeLessThan(1);
        buckets[Math.floor(value * 10)]!++;
      }
    }
    for (const count of buckets) expect(Math.abs(count - 900)).toBeLessThan(150);
  });
});
