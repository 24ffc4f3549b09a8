import { type AddressInfo, connect } from 'node:net';
import { text } from 'node:stream/consumers';
import { describe, expect, it } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { readBody } from '../../../src/proxy/body.ts';
import {
  RequestBodyReader,
  type RequestBodyReaderOptions,
  type Route,
  readRequestBody,
} from '../../../src/worker/request-body-reader.ts';
import { BYTE_MODEL, bytesOf, type Script, saying } from '../../support/fake-core.ts';
import { FakeReaderThread } from '../../support/fake-reader.ts';

import { CHAT, COMPLETIONS, closers, LOG, startServer, user } from '../../support/http-worker.ts';
import { statusesAfterBody } from '../../support/whole-body-first.ts';

describe('errors', () => {
  const context = { peer: '10.0.0.1:8082' };
  const cause = { code: 'PEER_LOST' as const, message: 'it died', context };
  const failing = (code: 'KV_LOAD_TIMEOUT' | 'INTERNAL', after = ''): Script => {
    return (_, emit) => {
      if (after !== '') emit({ index: 0, tokens: bytesOf(after) });
      const error = { code, message: 'the KV never came', context, cause };
      emit({ index: 0, tokens: [], finishReason: 'error', error });
    };
  };

  it('of the core have their own status and code before the first byte', async () => {
    const { json, post } = await startServer(failing('KV_LOAD_TIMEOUT'));
    const expected = {
      error: {
        message: 'the KV never came',
        type: 'server_error',
        param: null,
        code: 'KV_LOAD_TIMEOUT',
        context,
        cause,
      },
    };
    expect(await json(COMPLETIONS, { prompt: 'a' })).toEqual({ status: 504, body: expected });
    expect(await json(CHAT, { messages: user('a') })).toEqual({ status: 504, body: expected });
    const streamed = await post(COMPLETIONS, { prompt: 'a', stream: true });
    expect(streamed.status).toBe(504);
    expect(JSON.parse(streamed.body)).toEqual(expected);
  });

  it('midway in a stream are an event, then the end', async () => {
    const { events, json, core } = await startServer(failing('INTERNAL', 'so far'));
    const { status, events: all } = await events(COMPLETIONS, { prompt: ['a', 'b'] });
    expect(status).toBe(200);
    expect(all.at(-1)).toMatchObject({ error: { code: 'INTERNAL', message: 'the KV never came' } });
    expect((await json(COMPLETIONS, { prompt: 'a' })).status).toBe(500);
    expect(core.added).toHaveLength(3);
  });

  it('of one prompt abort the others', async () => {
    const { core, json, client } = await startServer((request, emit) => {
      if (request.promptTokens[0] === 97) failing('INTERNAL')(request, emit);
    });
    expect((await json(COMPLETIONS, { prompt: ['b', 'a', 'c'] })).status).toBe(500);
    // The one that failed is over already.
    expect(core.aborted).toHaveLength(2);
    expect(client.pending).toBe(0);
  });

  it.each([
    ['prompt', { prompt: undefined }],
    ['prompt', { prompt: '' }],
    ['prompt', { prompt: [] }],
    ['prompt', { prompt: [1.5] }],
    ['prompt.0', { prompt: [-1] }],
    ['prompt', { prompt: [300] }],
    ['prompt', { prompt: ['a', 7] }],
    ['prompt.1', { prompt: ['a', ''] }],
    ['max_tokens', { max_tokens: -1 }],
    ['max_tokens', { max_tokens: 0 }],
    ['max_tokens', { max_tokens: '5' }],
    ['min_tokens', { min_tokens: 20, max_tokens: 10 }],
    ['min_tokens', { min_tokens: 17 }],
    ['temperature', { temperature: -0.1 }],
    ['temperature', { temperature: 'hot' }],
    ['top_p', { top_p: 0 }],
    ['top_p', { top_p: 1.1 }],
    ['top_k', { top_k: -2 }],
    ['seed', { seed: 1.5 }],
    ['n', { n: 0 }],
    ['n', { n: 9 }],
    ['best_of', { best_of: 2 }],
    ['logprobs', { logprobs: 21 }],
    ['logprobs', { logprobs: true }],
    ['stop', { stop: 7 }],
    ['stop.0', { stop: [''] }],
    ['stop.1', { stop: ['a', 'a'.repeat(4_097)] }],
    ['stop_token_ids.0', { stop_token_ids: ['x'] }],
    ['presence_penalty', { presence_penalty: 2.1 }],
    ['frequency_penalty', { frequency_penalty: -3 }],
    ['repetition_penalty', { repetition_penalty: 0 }],
    ['min_p', { min_p: 1.1 }],
    ['logit_bias.5', { logit_bias: { 5: 101 } }],
    ['logit_bias.5', { logit_bias: { 5: Number.NaN } }],
    ['logit_bias.x', { logit_bias: { x: 1 } }],
    ['logit_bias', { logit_bias: { 300: 1 } }],
    ['allowed_token_ids', { allowed_token_ids: [] }],
    ['allowed_token_ids', { allowed_token_ids: [3, 300] }],
    ['bad_words.1', { bad_words: ['a', ' '] }],
    ['prompt_logprobs', { prompt_logprobs: 21 }],
    ['prompt_logprobs', { prompt_logprobs: 1, stream: true }],
    ['suffix', { suffix: 'end' }],
    ['stream_options', { stream_options: { include_usage: true } }],
    ['stream', { stream: 'yes' }],
  ])('name the field %s of a completion that is wrong: %j', async (param, change) => {
    const { json, core } = await startServer();
    const { status, body } = await json(COMPLETIONS, { prompt: 'a', ...change });
    expect(status).toBe(400);
    expect(body.error).toMatchObject({ type: 'invalid_request_error', param, code: 'REQUEST_INVALID' });
    expect(body.error.message).toContain(param);
    expect(core.added).toEqual([]);
  });

  it.each([
    ['messages', { messages: [] }],
    ['messages', { messages: 'hi' }],
    ['messages.0.role', { messages: [{ content: 'a' }] }],
    ['messages.0.content', { messages: user([{ type: 'image_url', image_url: {} }]) }],
    ['messages', { messages: [{ role: 'pirate', content: 'arr' }] }],
    ['top_logprobs', { top_logprobs: 2 }],
    ['logprobs', { logprobs: 2 }],
    ['max_completion_tokens', { max_completion_tokens: 0 }],
    ['tools.0.function', { tools: [{ type: 'function' }] }],
    ['response_format.type', { response_format: { type: 'xml' } }],
    ['guided_json', { guided_json: {}, response_format: { type: 'json_object' } }],
  ])('name the field %s of a chat that is wrong: %j', async (param, change) => {
    const { json } = await startServer();
    const { status, body } = await json(CHAT, { messages: user('a'), ...change });
    expect(status).toBe(400);
    expect(body.error).toMatchObject({ param, code: 'REQUEST_INVALID' });
  });

  it('are of their own kind for unknown models, long prompts, broken JSON, other types and paths', async () => {
    const { json, post, server } = await startServer();
    const unknown = await json(COMPLETIONS, { model: 'gpt', prompt: 'a' });
    expect(unknown).toMatchObject({
      status: 404,
      body: { error: { type: 'invalid_request_error', code: 'model_not_found', param: 'model' } },
    });
    expect((await json(CHAT, { model: 'gpt', messages: user('a') })).status).toBe(404);
    for (const change of [{ prompt: 'x'.repeat(256) }, { prompt: 'x'.repeat(250), max_tokens: 7 }]) {
      const long = await json(COMPLETIONS, change);
      expect(long).toMatchObject({
        status: 400,
        body: { error: { code: 'context_length_exceeded', param: 'prompt' } },
      });
    }
    const huge = await json(CHAT, { messages: user('x'.repeat(100_000)) });
    expect(huge).toMatchObject({ status: 400, body: { error: { code: 'context_length_exceeded' } } });
    expect((await json(COMPLETIONS, '{"prompt": "a"')).status).toBe(400);
    expect((await json(COMPLETIONS, '[1]')).status).toBe(400);
    expect((await json(COMPLETIONS, '')).body.error).toMatchObject({ code: 'REQUEST_INVALID' });
    const type = await json(COMPLETIONS, 'prompt=a', { 'content-type': 'application/x-www-form-urlencoded' });
    expect(type.status).toBe(415);
    expect(type.body.error.message).toContain('content-type: application/json');
    const zipped = await post(COMPLETIONS, { prompt: 'a' }, { 'content-encoding': 'gzip' });
    expect([zipped.status, zipped.headers['accept-encoding']]).toEqual([415, 'identity']);
    expect(zipped.body).toMatch(/gzip.*BODY_ENCODED/);
    expect((await post(COMPLETIONS, { prompt: 'a' }, { 'content-encoding': 'identity' })).status).toBe(200);
    const nowhere = await server.inject({ url: '/v1/nothing' });
    expect([nowhere.statusCode, nowhere.json()]).toMatchObject([404, { error: { code: 'REQUEST_INVALID' } }]);
    const big = await json(COMPLETIONS, { prompt: 'x'.repeat(17 * 2 ** 20) });
    expect(big).toMatchObject({ status: 413, body: { error: { code: 'REQUEST_INVALID' } } });
    const notice = await json('/kv/release', { request_id: 'x'.repeat(40_000) });
    expect(notice).toMatchObject({ status: 413, body: { error: { code: 'REQUEST_INVALID' } } });
    expect((await json(COMPLETIONS, '{"prompt":"a","__proto__":{"n":2}}')).status).toBe(400);
  });

  it('of a body that is too long are read by a client who sends all of it first, such as a proxy', async () => {
    const { server } = await startServer();
    await server.listen({ port: 0, host: '127.0.0.1' });
    const { port } = server.server.address() as AddressInfo;
    const at = { host: '127.0.0.1', port };
    expect(await statusesAfterBody(at, COMPLETIONS, 32 * 2 ** 20)).toEqual(['413', '200']);
    expect(await statusesAfterBody(at, '/kv/release', 32 * 2 ** 20)).toEqual(['413', '200']);
  });

  it('of what is no HTTP have their form too', async () => {
    const { server } = await startServer();
    await server.listen({ port: 0, host: '127.0.0.1' });
    const { port } = server.server.address() as AddressInfo;
    for (const said of [
      '\x16\x03\x01\x02\x00\x01\x00',
      'GET / HTTP/1.1\r\nhost: x\r\ncontent-length: a\r\n\r\n',
    ]) {
      const socket = connect(port, '127.0.0.1');
      socket.write(said);
      const answer = await text(socket);
      expect(answer).toMatch(/^HTTP\/1\.1 400 /);
      expect(JSON.parse(answer.slice(answer.indexOf('{')))).toMatchObject({
        error: { type: 'invalid_request_error', message: expect.stringContaining('no HTTP') },
      });
    }
  });

  it('refuse an id that is under way or cannot be one', async () => {
    const { core, json } = await startServer(() => {});
    const first = json(COMPLETIONS, { prompt: 'a' }, { 'x-request-id': 'twice' });
    await core.until((message) => message.type === 'add');
    const second = await json(COMPLETIONS, { prompt: 'a' }, { 'x-request-id': 'twice' });
    expect(second).toMatchObject({ status: 400, body: { error: { param: 'X-Request-Id' } } });
    expect((await json(COMPLETIONS, { prompt: 'a' }, { 'x-request-id': 'a b' })).status).toBe(400);
    core.emit({ type: 'fatal', error: { code: 'INTERNAL', message: 'over', context: {} } });
    expect(await first).toMatchObject({ status: 500, body: { error: { message: 'over' } } });
    expect((await json(COMPLETIONS, { prompt: 'a' })).status).toBe(500);
  });
});

describe('long bodies', () => {
  const long = { prompt: Array.from({ length: 200 }, () => 97), user: 'x'.repeat(5_000) };

  async function startSlow(limits: RequestBodyReaderOptions = {}) {
    const thread = new FakeReaderThread();
    const reader = await RequestBodyReader.start(demoModelDir(), LOG, {
      threadAfterMs: 0,
      ...limits,
      openThread: () => thread,
    });
    closers.push(() => reader.close());
    thread.emit({ type: 'ready' });
    return { thread, ...(await startServer(saying('x'), {}, reader)) };
  }

  it('hold nobody up while they are read, and are answered like others', async () => {
    const { thread, server, json } = await startSlow();
    const pending = json(COMPLETIONS, long);
    await thread.until(1);
    expect((await server.inject({ url: '/version' })).statusCode).toBe(200);
    expect((await json(COMPLETIONS, { prompt: [97] })).status).toBe(200);
    const { served, route, body } = thread.received[0]!;
    thread.emit({ type: 'read', reading: readRequestBody(served, BYTE_MODEL, route, body) });
    expect(await pending).toMatchObject({ status: 200, body: { choices: [{ text: 'x' }] } });
  });

  it('that could not be read have their code, and are no longer under way', async () => {
    const { thread, json, inFlight } = await startSlow();
    const pending = json(CHAT, { messages: user('x'.repeat(5_000)) });
    await thread.until(1);
    expect(inFlight.size).toBe(1);
    thread.emit({ type: 'refused', error: { code: 'BODY_TOO_COSTLY', message: 'too much', context: {} } });
    expect(await pending).toMatchObject({ status: 413, body: { error: { code: 'BODY_TOO_COSTLY' } } });
    expect(inFlight.size).toBe(0);
  });

  it('that find no room to wait in are refused, and told when to come again', async () => {
    const { thread, json, post, inFlight } = await startSlow({ maxWaitingBytes: 6_000 });
    const first = post(COMPLETIONS, long);
    await thread.until(1);
    const { status, headers, body } = await post(COMPLETIONS, { ...long, user: 'x'.repeat(6_000) });
    expect([status, headers['retry-after']]).toEqual([503, '3']);
    expect(JSON.parse(body)).toMatchObject({ error: { type: 'server_error', code: 'READER_BUSY' } });
    expect(inFlight.size).toBe(1);
    expect((await json(COMPLETIONS, { prompt: [97] })).status).toBe(200);
    const { served, route, body: read } = thread.received[0]!;
    thread.emit({ type: 'read', reading: readRequestBody(served, BYTE_MODEL, route, read) });
    expect((await first).status).toBe(200);
  });

  it.each([10_000, 1e6])('nested %d levels deep name the field, the same as behind a proxy', (levels) => {
    const served = { modelNames: ['demo'], maxModelLen: 256, vocabSize: 300 };
    for (const field of ['tools', 'x', 'prompt']) {
      const deep = new TextEncoder().encode(
        `{"prompt":"a","${field}":${'['.repeat(levels)}${']'.repeat(levels)}}`,
      );
      const refused = expect.objectContaining({
        code: 'REQUEST_INVALID',
        status: 400,
        message: `${field}: is nested deeper than 4096 levels`,
        context: { param: field },
      });
      expect(() => readRequestBody(served, BYTE_MODEL, 'completions', deep)).toThrow(refused);
      expect(() => readBody(deep)).toThrow(refused);
    }
  });

  it('with more messages than fit are refused before each of them is looked at', () => {
    let rendered = 0;
    const model = {
      ...BYTE_MODEL,
      applyChatTemplate: (...[messages, options]: Parameters<typeof BYTE_MODEL.applyChatTemplate>) => {
        rendered += messages.length;
        return BYTE_MODEL.applyChatTemplate(messages, options);
      },
    };
    const served = { modelNames: ['demo'], maxModelLen: 5_000, vocabSize: 300 };
    const read = (route: Route, body: object) => () =>
      readRequestBody(served, model, route, new TextEncoder().encode(JSON.stringify(body)));
    // 'user:;' and 'assistant:;' have 17 bytes together, which are tokens here.
    const turns = (count: number, role = 'user') =>
      Array.from({ length: count }, () => ({ role, content: '' }));
    const refused = (param: string) =>
      expect.objectContaining({
        code: 'CONTEXT_EXCEEDED',
        message: expect.stringContaining(`${param}: 600 messages, at least 5100 tokens, are too many`),
        context: { param },
      });
    expect(read('chat', { messages: turns(600) })).toThrow(refused('messages'));
    expect(read('responses', { input: turns(600) })).toThrow(refused('input'));
    expect(rendered).toBeLessThan(200);
    // What a template may leave out is not counted, nor what is cut off.
    expect(read('chat', { messages: turns(600, 'tool') })).not.toThrow();
    expect(read('chat', { messages: turns(600), truncate_prompt_tokens: 10 })).not.toThrow();
    expect(read('chat', { messages: turns(588) })).not.toThrow();
  });

  it('are refused by their size before any work where they cannot fit', () => {
    const model = {
      ...BYTE_MODEL,
      encode: () => {
        throw new Error('tokenized');
      },
    };
    const served = { modelNames: ['demo'], maxModelLen: 256, vocabSize: 300 };
    const read = (route: Route, body: object) => () =>
      readRequestBody(served, model, route, new TextEncoder().encode(JSON.stringify(body)));
    // Four characters a token at most.
    expect(read('completions', { prompt: 'x'.repeat(1_021) })).toThrow(
      "prompt: 1021 characters, at least 256 tokens, and 1 to generate are too many: this model's maximum context length is 256 tokens",
    );
    expect(read('completions', { prompt: 'x'.repeat(980), max_tokens: 12 })).toThrow('at least 245 tokens');
    expect(read('completions', { prompt: 'x'.repeat(976), max_tokens: 12 })).toThrow('tokenized');
    expect(read('chat', { messages: user('x'.repeat(2_000)) })).toThrow('messages: 2016 characters');
    expect(read('tokenize', { prompt: 'x'.repeat(1_025) })).toThrow('at least 257 tokens, are too many');
    expect(read('tokenize', { prompt: 'x'.repeat(1_024) })).toThrow('tokenized');
  });
});
