import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { uniform } from '../../../src/model/random.ts';
import { GREEDY, logprobOf, promptLogprobOf, sample } from '../../../src/model/sampler.ts';
import type { SamplingParams, TokenHistory } from '../../../src/scheduler/types.ts';

const pick = (logits: number[], params: Partial<SamplingParams> = {}, outputPosition = 0, index = 0) =>
  sample(Float32Array.from(logits), { params: { ...GREEDY, ...params }, outputPosition, index })!;

const anyLogits = fc.array(fc.float({ min: -20, max: 20, noNaN: true }), { minLength: 1, maxLength: 60 });

/** Of a prompt and what came after it. */
function historyOf(prompt: readonly number[], output: readonly number[]): TokenHistory {
  const tokens = Int32Array.from([...prompt, ...output]);
  return {
    promptLength: prompt.length,
    length: tokens.length,
    tokens: (start, end) => tokens.slice(start, end),
  };
}

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

  it('draws none that is less likely than min-p of the likeliest, after temperature', () => {
    fc.assert(
      fc.property(anyLogits, fc.double({ min: 0, max: 1, noNaN: true }), fc.nat(), (logits, minP, seed) => {
        const { token } = pick(logits, { temperature: 0.7, minP, seed });
        const highest = Math.max(...logits.map(Math.fround));
        expect(Math.exp((Math.fround(logits[token]!) - highest) / 0.7)).toBeGreaterThanOrEqual(minP);
      }),
    );
  });

  const penalized = (params: Partial<SamplingParams>, logits: number[], output = [2, 2, 1]) =>
    sample(Float32Array.from(logits), {
      params: { ...GREEDY, ...params },
      outputPosition: output.length,
      index: 0,
      history: historyOf([0, 3], output),
    })?.token;

  it('takes presence once and frequency each time, of what the output has', () => {
    // 2 stands in the output twice, 1 once, 0 in the prompt alone
    expect(penalized({}, [5, 6, 7, 4])).toBe(2);
    expect(penalized({ presencePenalty: 1.5 }, [5, 6, 7, 4])).toBe(2);
    expect(penalized({ presencePenalty: 2 }, [5.5, 6, 7, 4])).toBe(0);
    expect(penalized({ frequencyPenalty: 0.9 }, [5, 6.5, 7, 4])).toBe(1);
    expect(penalized({ frequencyPenalty: -1 }, [5, 6.5, 6, 4])).toBe(2);
  });

  it('divides logits above zero by the repetition penalty and multiplies those below, of prompt and output', () => {
    expect(penalized({ repetitionPenalty: 2 }, [8, 1, 1, 1, 5])).toBe(4);
    expect(penalized({ repetitionPenalty: 2 }, [-1, -3, -3, -3, -1.5])).toBe(4);
    expect(penalized({ repetitionPenalty: 0.5 }, [-2, -9, -9, -9, -1.5])).toBe(0);
  });

  it('adds biases before penalties: repetition works on what is above zero by then', () => {
    // -1 + 4 = 3, halved to 1.5; unbiased it would be -2 + 4 = 2
    expect(penalized({ repetitionPenalty: 2, logitBias: [[0, 4]] }, [-1, -9, -9, -9, 1.75])).toBe(4);
    expect(
      penalized(
        {
          logitBias: [
            [0, 4],
            [9, 100],
          ],
        },
        [-1, 0, 0, 0, 1.75],
      ),
    ).toBe(0);
  });

  it('draws from the allowed tokens alone, and from those of the grammar among them', () => {
    const logits = Float32Array.from({ length: 70 }, (_, i) => i / 10);
    const mask = Uint32Array.of(0b1000, 1 << 31, 0);
    const draw = (params: Partial<SamplingParams>, grammar?: Uint32Array) =>
      sample(logits, { params: { ...GREEDY, ...params }, outputPosition: 0, index: 0 }, grammar)?.token;
    expect(draw({ allowedTokenIds: [3, 40, 65] })).toBe(65);
    expect(draw({}, mask)).toBe(63);
    expect(draw({ allowedTokenIds: [3, 40, 65] }, mask)).toBe(3);
    expect(draw({ allowedTokenIds: [3] }, mask.subarray(0, 1))).toBe(3);
    expect(draw({ allowedTokenIds: [65] }, mask)).toBeUndefined();
    expect(draw({ allowedTokenIds: [65], minTokens: 1, stopTokenIds: [65] })).toBeUndefined();
  });

  it('bans the last token of a bad word once the rest of it stands at the end of the output', () => {
    const logits = [1, 2, 3, 4, 9];
    expect(penalized({ badWords: [[4]] }, logits)).toBe(3);
    expect(penalized({ badWords: [[2, 1, 4]] }, logits)).toBe(3);
    expect(penalized({ badWords: [[2, 4]] }, logits)).toBe(4);
    // the 3 before is the prompt's
    expect(penalized({ badWords: [[3, 4]] }, logits, [])).toBe(4);
  });

  it('gives the rank of a prompt token', () => {
    expect([0, 1, 2, 3].map((id) => promptLogprobOf(Float32Array.of(1, 5, 3, 3), id, 0).rank)).toEqual([
      4, 1, 3, 3,
    ]);
  });

  it('refuses logits that are no numbers', () => {
    expect(() => pick([1, Number.NaN, 2])).toThrow(/no usable distribution/);
    expect(() => pick([Number.NEGATIVE_INFINITY])).toThrow(/no usable distribution/);
    expect(() => pick([1, Number.NaN], { allowedTokenIds: [0] })).toThrow(/no usable distribution/);
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
