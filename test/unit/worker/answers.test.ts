import { expect, it } from 'vitest';
import { answerOfChoices } from '../../../src/worker/server/answers.ts';
import type { ChoiceEvent } from '../../../src/worker/server/choice.ts';

/** The usage in each chunk of a stream of two choices. */
async function usages(options: { include_usage?: boolean; continuous_usage_stats?: boolean }) {
  const format = answerOfChoices({ id: 'cmpl-1', created: 0, model: 'm', fingerprint: 'fp_1' }, options, {
    object: 'text_completion',
    chunkObject: 'text_completion',
    deltas: async ({ index }) => [{ index }],
    whole: async () => ({}),
  });
  const start = { prompt: { text: '', tokens: Int32Array.of(1, 2, 3) } };
  const event = (index: number, tokens: number[], first = false): ChoiceEvent => ({
    index,
    delta: { text: 'x', parts: [], tokens, logprobs: [] },
    ...(first && { start }),
  });
  const chunks: object[] = [];
  for (const each of [event(0, [7], true), event(1, [8, 9], true), event(0, [7, 7])]) {
    for (const { data } of await format.said(each)) chunks.push(data);
  }
  return chunks.map((chunk) => (chunk as { usage?: object }).usage);
}

it('tells in each chunk what its choice has come to, where continuous_usage_stats asks for it', async () => {
  const of = (completion: number) => ({
    prompt_tokens: 3,
    completion_tokens: completion,
    total_tokens: 3 + completion,
  });
  expect(await usages({ include_usage: true, continuous_usage_stats: true })).toEqual([of(1), of(2), of(3)]);
  expect(await usages({ include_usage: true })).toEqual([null, null, null]);
  expect(await usages({ continuous_usage_stats: true })).toEqual([undefined, undefined, undefined]);
});
