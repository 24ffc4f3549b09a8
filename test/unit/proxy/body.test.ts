import { describe, expect, test } from 'vitest';
import { Cancellation } from '../../../src/deferred.ts';
import { createLogger } from '../../../src/observability/log.ts';
import { BodyReader, type RequestBody, readBody, type ToBodyThread } from '../../../src/proxy/body.ts';
import { ScriptedReader } from '../../support/fake-reader.ts';

const bytes = (body: unknown) =>
  new TextEncoder().encode(typeof body === 'string' ? body : JSON.stringify(body));
const prefillOf = (body: unknown): unknown =>
  JSON.parse(new TextDecoder().decode(readBody(bytes(body)).prefill));

describe('the prefill copy', () => {
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
    expect(prefillOf(original)).toEqual({
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
  });

  test('keeps what the first token is drawn by and told with, where the consumer takes it over', () => {
    const nativeOf = (body: unknown): unknown =>
      JSON.parse(new TextDecoder().decode(readBody(bytes(body)).nativePrefill));
    const drawn = { prompt: 'Hello', temperature: 0.5, min_tokens: 5, logprobs: true, top_logprobs: 4 };
    expect(nativeOf({ ...drawn, max_tokens: 50, return_token_ids: true })).toEqual({
      ...drawn,
      max_tokens: 1,
      min_tokens: 1,
    });
    const plain = readBody(bytes({ prompt: 'Hello', n: 2 }));
    expect(plain.nativePrefill).toBe(plain.prefill);
  });

  test('one token of a response too', () => {
    const original = { input: 'a', max_output_tokens: 50, include: ['x'], stream: true };
    const prefill = { input: 'a', max_tokens: 1, max_output_tokens: 1, include: ['x'], stream: false };
    expect(prefillOf(original)).toEqual(prefill);
  });

  test('adds nothing but max_tokens to a plain request', () => {
    expect(prefillOf({ model: 'm', prompt: 'Hello' })).toEqual({
      model: 'm',
      prompt: 'Hello',
      max_tokens: 1,
    });
  });

  test('keeps a field that is named like the prototype a field, for the producer to refuse', () => {
    const text = new TextDecoder().decode(readBody(bytes('{"__proto__":{"n":2},"prompt":"a"}')).prefill);
    expect(text).toBe('{"__proto__":{"n":2},"prompt":"a","max_tokens":1}');
  });
});

test.each([
  [{ prompt: 'a', max_tokens: 9, max_completion_tokens: 7 }, 9],
  [{ messages: [], max_tokens: 9 }, 9],
  [{ messages: [], max_tokens: 9, max_completion_tokens: 7 }, 7],
  [{ input: 'a', max_output_tokens: 8, max_tokens: 9 }, 8],
  [{ prompt: 'a' }, undefined],
])('of a prompt that is cut off to fit, tells what %j is to generate', (body, tokens) => {
  expect(readBody(bytes({ ...body, truncate_prompt_tokens: -1 })).outputTokens).toBe(tokens);
  expect(readBody(bytes({ ...body, truncate_prompt_tokens: 5 })).outputTokens).toBeUndefined();
});

test('the original is kept byte for byte', () => {
  const body = bytes(' {"prompt": "a"}\n');
  expect(readBody(body).original).toBe(body);
});

test.each([
  [
    { prompt: 'a', model: 'm' },
    { prompts: 1, model: 'm' },
  ],
  [{ prompt: ['a', 'b', 'c'] }, { prompts: 3, model: undefined }],
  [{ prompt: [1, 2, 3] }, { prompts: 1 }],
  [{ prompt: [[1], [2, 3]] }, { prompts: 2 }],
  [{ prompt: [] }, { prompts: 1 }],
  [
    { messages: [], model: 7 },
    { prompts: 1, model: undefined },
  ],
])('%j asks for %j', (body, asked) => {
  expect(readBody(bytes(body))).toMatchObject(asked);
});

test('what is no UTF-8 is refused, and a byte order mark is passed over', () => {
  const body = bytes('\ufeff{"prompt":"a"}');
  expect(readBody(body)).toMatchObject({ prompts: 1, original: body });
  const broken = body.map((byte) => (byte === 0x61 ? 0xff : byte));
  expect(() => readBody(broken)).toThrow('the body is not JSON: ');
});

test.each([
  ['', 'REQUEST_INVALID', /^the body is not JSON: /],
  ['{"a":', 'REQUEST_INVALID', /^the body is not JSON: /],
  ['null', 'REQUEST_INVALID', /^the body must be a JSON object$/],
  ['[1]', 'REQUEST_INVALID', /^the body must be a JSON object$/],
  [`{"x":${'['.repeat(1e6)}${']'.repeat(1e6)}}`, 'REQUEST_INVALID', /^x: is nested deeper than 4096 levels$/],
])('is refused where it cannot be read, and told why (%#)', (body, code, message) => {
  expect(() => readBody(bytes(body))).toThrow(
    expect.objectContaining({ code, message: expect.stringMatching(message) }),
  );
});

test('a body whose thread ends is read all the same, though its memory went there', async () => {
  const thread = new ScriptedReader<ToBodyThread, RequestBody>();
  const reader = new BodyReader(createLogger({ level: 'silent', format: 'json' }, 'main'), {
    tokenizer: 'a checkpoint',
    openThread: () => thread,
  });
  thread.emit({ type: 'ready' });
  const body = Buffer.concat([Buffer.from('{"prompt":'), Buffer.alloc(40_000, ' '), Buffer.from('"Hi"}')]);
  const wanted = { text: false, blockSizes: [], ids: true };
  const read = reader.read(body, new Cancellation(), wanted, '/v1/completions');
  await thread.until(1);
  expect(body.byteLength).toBe(0);
  thread.exit(new Error('it has ended'));
  expect(await read).toMatchObject({ prompts: 1, tokenized: false });
  await reader.close();
});
