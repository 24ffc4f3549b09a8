import { expect, test } from 'vitest';
import { prefillCopy } from '../../../src/proxy/attempt.ts';

test('one token, not streamed, one choice, and nothing that only the answer needs', () => {
  const original = {
    model: 'm',
    messages: [{ role: 'user', content: 'hi' }],
    max_tokens: 50,
    max_completion_tokens: 40,
    stream: true,
    stream_options: { include_usage: true },
    n: 3,
    best_of: 3,
    echo: true,
    min_tokens: 5,
    logprobs: true,
    top_logprobs: 4,
    return_token_ids: true,
    return_tokens_as_token_ids: true,
    temperature: 0.5,
    seed: 7,
    stop: ['x'],
  };
  const before = structuredClone(original);
  expect(prefillCopy(original)).toEqual({
    model: 'm',
    messages: [{ role: 'user', content: 'hi' }],
    max_tokens: 1,
    max_completion_tokens: 1,
    stream: false,
    n: 1,
    best_of: 1,
    echo: false,
    temperature: 0.5,
    seed: 7,
    stop: ['x'],
  });
  expect(original).toEqual(before);
});

test('adds nothing but max_tokens to a plain request', () => {
  expect(prefillCopy({ model: 'm', prompt: 'Hello' })).toEqual({
    model: 'm',
    prompt: 'Hello',
    max_tokens: 1,
  });
});
