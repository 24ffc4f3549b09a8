import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { sample } from '../../../src/model/sampler.ts';
import { samplingDigest, sharedSeed } from '../../../src/scheduler/sampling-digest.ts';
import type { SamplingParams } from '../../../src/scheduler/types.ts';
import { transferIdOf } from '../../../src/wire/ids.ts';

const drawn: SamplingParams = {
  temperature: 0.7,
  topP: 0.9,
  topK: 40,
  seed: 7,
  maxTokens: 100,
  minTokens: 3,
  stopTokenIds: [2, 5],
  logprobs: 1,
};
const greedy: SamplingParams = { ...drawn, temperature: 0, minTokens: 0 };

describe('samplingDigest', () => {
  it('is the same on every version and machine', () => {
    expect(samplingDigest(drawn)).toBe('3fcf68290b375f34e2a4715c6d624fd8');
    expect(samplingDigest(greedy)).toBe('54bcff07f4f718ee5d15159e9be10439');
  });

  it.each<[string, Partial<SamplingParams>]>([
    ['temperature', { temperature: 0.8 }],
    ['topP', { topP: 0.8 }],
    ['topK', { topK: 20 }],
    ['seed', { seed: 8 }],
    ['minTokens', { minTokens: 0 }],
    ['stopTokenIds', { stopTokenIds: [2] }],
    ['logprobs', { logprobs: 2 }],
    ['minP', { minP: 0.1 }],
    ['repetitionPenalty', { repetitionPenalty: 1.2 }],
    ['logitBias', { logitBias: [[3, 1]] }],
    ['allowedTokenIds', { allowedTokenIds: [3] }],
    ['badWords', { badWords: [[3]] }],
  ])('tells another %s', (_name, other) => {
    expect(samplingDigest({ ...drawn, ...other })).not.toBe(samplingDigest(drawn));
  });

  it('does not mind what the first token does not hang on', () => {
    const copy = { ...drawn, maxTokens: 1, minTokens: 1, stopTokenIds: [5, 2, 5] };
    expect(samplingDigest(copy)).toBe(samplingDigest(drawn));
    const looksBack = { presencePenalty: 1, frequencyPenalty: 1, badWords: [[1, 2]] };
    expect(samplingDigest({ ...drawn, ...looksBack, minP: 0, repetitionPenalty: 1, logitBias: [] })).toBe(
      samplingDigest(drawn),
    );
    expect(samplingDigest({ ...greedy, minP: 0.5, seed: 99, topP: 0.1, topK: 3, stopTokenIds: [1] })).toBe(
      samplingDigest(greedy),
    );
  });

  it('is equal only where the sampler draws the same', () => {
    const params = fc.record({
      temperature: fc.constantFrom(0, 0.5, 1),
      topP: fc.constantFrom(0.3, 1),
      topK: fc.constantFrom(0, 2),
      seed: fc.nat(3),
      maxTokens: fc.nat(3),
      minTokens: fc.nat(2),
      stopTokenIds: fc.subarray([0, 1, 2, 3]),
      logprobs: fc.constantFrom(0, 2),
      minP: fc.constantFrom(0, 0.5),
      repetitionPenalty: fc.constantFrom(1, 1.5),
      presencePenalty: fc.constantFrom(0, 1),
      logitBias: fc.constantFrom<[number, number][][]>(
        [],
        [
          [1, 5],
          [2, 4],
        ],
        [
          [2, 4],
          [1, 5],
        ],
      ),
      badWords: fc.constantFrom([], [[1]], [[2, 1]]),
    });
    const history = { promptLength: 2, length: 2, tokens: () => Int32Array.of(0, 1) };
    fc.assert(
      fc.property(
        params,
        params,
        fc.array(fc.float({ min: -4, max: 4, noNaN: true }), { minLength: 8, maxLength: 8 }),
        (a, b, logits) => {
          if (samplingDigest(a) !== samplingDigest(b)) return;
          const draw = (one: SamplingParams) =>
            sample(Float32Array.from(logits), { params: one, outputPosition: 0, index: 0, history });
          expect(draw(a)).toEqual(draw(b));
        },
      ),
      { numRuns: 500 },
    );
  });
});

it('makes one seed of one id, on every version and machine', () => {
  expect(sharedSeed(transferIdOf('cmpl-x'))).toBe(1_769_315_233);
});
