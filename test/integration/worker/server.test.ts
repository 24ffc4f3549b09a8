import { once } from 'node:events';
import { request as httpRequest } from 'node:http';
import type { AddressInfo } from 'node:net';
import fc from 'fast-check';
import { afterEach, describe, expect, it } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import type { DebugAudience, WorkerConfig } from '../../../src/config/worker-config.ts';
import { createLogger } from '../../../src/observability/log.ts';
import { MetricsPage, readHistogram } from '../../../src/observability/metrics.ts';
import { packLogprobs } from '../../../src/scheduler/prompt-logprobs.ts';
import type { TokenLogprob } from '../../../src/scheduler/types.ts';
import {
  type BodyReader,
  RequestReader,
  type RequestReaderOptions,
  type Route,
  readBody,
} from '../../../src/worker/request-reader.ts';
import { InFlight } from '../../../src/worker/server/in-flight.ts';
import { createServer } from '../../../src/worker/server/server.ts';
import {
  BYTE_MODEL,
  BYTE_READER,
  bytesOf,
  EOS,
  FakeCore,
  type Script,
  saying,
} from '../../support/fake-core.ts';
import { FakeReaderThread } from '../../support/fake-reader.ts';

/** What these answers may hold; a test reads what it knows to be there. */
interface Answer {
  readonly [key: string]: unknown;
  readonly choices: {
    readonly index: number;
    readonly text: string;
    readonly delta: object;
    readonly finish_reason: string | null;
    readonly logprobs: { readonly token_logprobs: readonly number[] };
  }[];
  readonly error: { readonly message: string };
  readonly data: { readonly id: string }[];
}

const LOG = createLogger({ level: 'silent', format: 'json' }, 'main');
const closers: (() => Promise<void>)[] = [];
afterEach(async () => {
  await Promise.all(closers.splice(0).map((close) => close()));
});

async function start(
  script: Script = saying('hello'),
  randomizeRequestIds = true,
  debugState?: DebugAudience,
  role: WorkerConfig['role'] = 'both',
  reader: BodyReader = BYTE_READER,
) {
  const core = new FakeCore(script);
  const client = await core.connect();
  const metrics = new MetricsPage();
  const inFlight = new InFlight();
  const server = createServer({
    config: {
      servedModelNames: ['demo', 'alias'],
      randomizeRequestIds,
      role,
      maxNumSeqs: 8,
      transfer: { kvKey: 'transfer' },
      ...(debugState && { debugState }),
    },
    core: client,
    reader,
    model: BYTE_MODEL,
    inFlight,
    metrics,
    pages: [metrics],
    version: '1.2.3',
    log: LOG,
  });
  closers.push(async () => {
    await client.close();
    await server.close();
  });
  const post = async (url: string, payload: unknown, headers: Record<string, string> = {}) => {
    const response = await server.inject({
      method: 'POST',
      url,
      payload: typeof payload === 'string' ? payload : JSON.stringify(payload),
      headers: { 'content-type': 'application/json', ...headers },
    });
    return { status: response.statusCode, headers: response.headers, body: response.body };
  };
  const json = async (url: string, payload: unknown, headers?: Record<string, string>) => {
    const { status, body } = await post(url, payload, headers);
    return { status, body: JSON.parse(body) as Answer };
  };
  /** The events of a stream, `[DONE]` checked and left out. */
  const events = async (url: string, payload: object) => {
    const { status, headers, body } = await post(url, { ...payload, stream: true });
    expect(headers['content-type']).toMatch(/^text\/event-stream/);
    const data = body.split('\n\n').filter((part) => part !== '');
    expect(data.pop()).toBe('data: [DONE]');
    return { status, events: data.map((part) => JSON.parse(part.replace(/^data: /, '')) as Answer) };
  };
  return { core, client, server, metrics, inFlight, post, json, events };
}

const COMPLETIONS = '/v1/completions';
const CHAT = '/v1/chat/completions';
const user = (content: unknown) => [{ role: 'user', content }];

describe('/v1/completions', () => {
  it('answers in the form of OpenAI', async () => {
    const { core, json } = await start();
    const { status, body } = await json(COMPLETIONS, { model: 'demo', prompt: 'abc', max_tokens: 32 });
    expect(status).toBe(200);
    expect(body).toEqual({
      id: expect.stringMatching(/^cmpl-[0-9a-f]{32}$/),
      object: 'text_completion',
      created: expect.any(Number),
      model: 'demo',
      choices: [{ index: 0, text: 'hello', logprobs: null, finish_reason: 'stop' }],
      usage: { prompt_tokens: 3, completion_tokens: 6, total_tokens: 9 },
    });
    expect(core.added[0]).toMatchObject({
      requestId: expect.stringMatching(/^cmpl-[0-9a-f]{32}-0-[0-9a-f]{8}$/),
      promptTokens: Int32Array.from(bytesOf('abc')),
      n: 1,
      sampling: { temperature: 1, topP: 1, topK: 0, maxTokens: 32, minTokens: 0, stopTokenIds: [EOS] },
    });
  });

  it('keeps the request id, with the index of the prompt behind it', async () => {
    const { core, json, post } = await start();
    const id = `___prefill_addr_[::1]:8082___decode_addr_10.0.0.2:8084_${'a'.repeat(32)}`;
    const { body } = await json(COMPLETIONS, { prompt: ['a', 'b'], max_tokens: 9 }, { 'x-request-id': id });
    expect(body['id']).toBe(`cmpl-${id}`);
    expect(core.added.map(({ requestId }) => requestId.slice(0, -8))).toEqual([
      `cmpl-${id}-0-`,
      `cmpl-${id}-1-`,
    ]);
    const plain = await start(saying('x'), false);
    await plain.json(CHAT, { messages: user('a') }, { 'x-request-id': id });
    expect(plain.core.added[0]!.requestId).toBe(`chatcmpl-${id}`);
    expect(
      (await post(COMPLETIONS, { prompt: 'a' }, { 'x-request-id': 'mine' })).headers['x-request-id'],
    ).toBe('mine');
  });

  it('hands every sampling field to the core', async () => {
    const { core, json } = await start();
    const { status } = await json(COMPLETIONS, {
      model: 'alias',
      prompt: [1, 2, 3],
      max_tokens: 7,
      min_tokens: 2,
      temperature: 0.5,
      top_p: 0.9,
      top_k: 40,
      seed: 42,
      n: 2,
      best_of: 2,
      logprobs: 3,
      ignore_eos: true,
      stop_token_ids: [7],
      presence_penalty: 0,
      frequency_penalty: 0.0,
      user: 'someone',
    });
    expect(status).toBe(200);
    expect(core.added[0]).toMatchObject({
      promptTokens: Int32Array.of(1, 2, 3),
      n: 2,
      sampling: {
        temperature: 0.5,
        topP: 0.9,
        topK: 40,
        seed: 42,
        maxTokens: 7,
        minTokens: 2,
        stopTokenIds: [7],
        logprobs: 3,
      },
    });
    expect(core.added[0]!.sampling).not.toHaveProperty('promptLogprobs');
  });

  it('generates 16 tokens where not told, and never past the context', async () => {
    const { core, json } = await start();
    await json(COMPLETIONS, { prompt: 'abc' });
    await json(COMPLETIONS, { prompt: 'x'.repeat(250) });
    expect(core.added.map(({ sampling }) => sampling.maxTokens)).toEqual([16, 6]);
  });

  it('answers several prompts and several completions of each, in order', async () => {
    const { json } = await start((request, emit) => {
      // Backwards, as an executor may.
      for (let index = request.n - 1; index >= 0; index--) {
        emit({
          index,
          tokens: [...bytesOf(`${String.fromCharCode(request.promptTokens[0]!)}${index}`)],
          finishReason: 'length',
        });
      }
    });
    const { body } = await json(COMPLETIONS, { prompt: [bytesOf('p'), bytesOf('q')], n: 2, max_tokens: 2 });
    expect(body.choices.map((choice) => [choice.index, choice.text, choice.finish_reason])).toEqual([
      [0, 'p0', 'length'],
      [1, 'p1', 'length'],
      [2, 'q0', 'length'],
      [3, 'q1', 'length'],
    ]);
    expect(body['usage']).toEqual({ prompt_tokens: 2, completion_tokens: 8, total_tokens: 10 });
  });

  it('echoes prompts, and scores them with max_tokens 0', async () => {
    const { core, json, events } = await start();
    const echoed = await json(COMPLETIONS, { prompt: 'say ', echo: true });
    expect(echoed.body.choices[0]!.text).toBe('say hello');
    const tokens = await json(COMPLETIONS, { prompt: bytesOf('say '), echo: true });
    expect(tokens.body.choices[0]!.text).toBe('say hello');
    const scored = await json(COMPLETIONS, { prompt: 'say ', echo: true, max_tokens: 0 });
    expect(scored.body.choices[0]).toMatchObject({ text: 'say ', finish_reason: 'length' });
    expect(scored.body['usage']).toMatchObject({ completion_tokens: 0 });
    expect(core.added[2]!.sampling.maxTokens).toBe(1);
    const streamed = await events(COMPLETIONS, { prompt: 'say ', echo: true });
    expect(streamed.events.map((event) => event.choices[0]!.text).join('')).toBe('say hello');
  });

  it('gives log-probabilities of completion and echoed prompt, each where its text begins', async () => {
    const entry = (token: number, logprob: number): TokenLogprob => ({
      token,
      logprob,
      top: [
        { token: 120, logprob: -0.1 },
        { token: 121, logprob: Number.NEGATIVE_INFINITY },
      ],
    });
    const { core, json, events } = await start((request, emit) => {
      emit({
        index: 0,
        tokens: [0xc3, 0xa9],
        logprobs: [entry(0xc3, -1), entry(0xa9, -2)],
        ...(request.sampling.promptLogprobs === undefined
          ? {}
          : { promptLogprobs: packLogprobs([entry(98, -3)]) }),
      });
      emit({ index: 0, tokens: [EOS], logprobs: [entry(EOS, -4)], finishReason: 'stop' });
    });
    const plain = await json(COMPLETIONS, { prompt: 'ab', logprobs: 2 });
    expect(plain.body.choices[0]!.logprobs).toEqual({
      tokens: ['bytes:\\xc3', 'bytes:\\xa9', ''],
      token_logprobs: [-1, -2, -4],
      top_logprobs: [
        { x: -0.1, y: -9999, 'bytes:\\xc3': -1 },
        { x: -0.1, y: -9999, 'bytes:\\xa9': -2 },
        { x: -0.1, y: -9999, '': -4 },
      ],
      text_offset: [0, 0, 1],
    });
    const echoed = await json(COMPLETIONS, { prompt: 'ab', logprobs: 0, echo: true });
    expect(core.added[1]!.sampling).toMatchObject({ logprobs: 0, promptLogprobs: 0 });
    expect(echoed.body.choices[0]!.logprobs).toEqual({
      tokens: ['a', 'b', 'bytes:\\xc3', 'bytes:\\xa9', ''],
      token_logprobs: [null, -3, -1, -2, -4],
      top_logprobs: [null, null, null, null, null],
      text_offset: [0, 1, 2, 2, 3],
    });
    const byId = { prompt: 'ab', logprobs: 2, return_tokens_as_token_ids: true };
    expect((await json(COMPLETIONS, byId)).body.choices[0]!.logprobs).toMatchObject({
      tokens: [`token_id:${0xc3}`, `token_id:${0xa9}`, `token_id:${EOS}`],
      top_logprobs: [
        { 'token_id:120': -0.1, 'token_id:121': -9999, [`token_id:${0xc3}`]: -1 },
        { [`token_id:${0xa9}`]: -2 },
        { [`token_id:${EOS}`]: -4 },
      ],
    });
    const streamed = await events(COMPLETIONS, { prompt: 'ab', logprobs: 2 });
    const joined = streamed.events.flatMap((event) => event.choices[0]!.logprobs.token_logprobs);
    expect(joined).toEqual([-1, -2, -4]);
  });
});

describe('/v1/chat/completions', () => {
  it('renders the conversation and answers in the form of OpenAI', async () => {
    const { core, json } = await start();
    const { body } = await json(CHAT, {
      model: 'demo',
      messages: [
        { role: 'system', content: 'be brief' },
        { role: 'user', content: [{ type: 'text', text: 'hi' }] },
      ],
      max_tokens: 50,
      max_completion_tokens: 20,
    });
    expect(body).toEqual({
      id: expect.stringMatching(/^chatcmpl-[0-9a-f]{32}$/),
      object: 'chat.completion',
      created: expect.any(Number),
      model: 'demo',
      choices: [
        { index: 0, message: { role: 'assistant', content: 'hello' }, logprobs: null, finish_reason: 'stop' },
      ],
      usage: { prompt_tokens: 34, completion_tokens: 6, total_tokens: 40 },
    });
    expect(BYTE_MODEL.decode([...core.added[0]!.promptTokens])).toBe('system:be brief;user:hi;assistant:');
    expect(core.added[0]!.sampling.maxTokens).toBe(20);
    await json(CHAT, { messages: user('hi') });
    expect(core.added[1]!.sampling.maxTokens).toBe(256 - 'user:hi;assistant:'.length);
  });

  it('streams role, text, finish and usage', async () => {
    const { events } = await start(saying('hé'));
    const { events: chunks } = await events(CHAT, {
      messages: user('hi'),
      stream_options: { include_usage: true },
    });
    expect(
      chunks.map((chunk) => chunk.choices.map((choice) => [choice.delta, choice.finish_reason])),
    ).toEqual([
      [[{ role: 'assistant', content: '' }, null]],
      [[{ content: 'h' }, null]],
      [[{ content: 'é' }, null]],
      [[{}, 'stop']],
      [],
    ]);
    expect(chunks.map((chunk) => chunk['usage'])).toEqual([
      null,
      null,
      null,
      null,
      { prompt_tokens: 18, completion_tokens: 4, total_tokens: 22 },
    ]);
    expect(new Set(chunks.map((chunk) => chunk['id'])).size).toBe(1);
    expect(chunks[0]!['object']).toBe('chat.completion.chunk');
  });

  it('gives log-probabilities with bytes', async () => {
    const { json, core } = await start((_, emit) =>
      emit({
        index: 0,
        tokens: [0xc3],
        logprobs: [{ token: 0xc3, logprob: -1, top: [{ token: 97, logprob: -0.5 }] }],
        finishReason: 'length',
      }),
    );
    const { body } = await json(CHAT, { messages: user('hi'), logprobs: true, top_logprobs: 1 });
    expect(core.added[0]!.sampling.logprobs).toBe(1);
    expect(body.choices[0]!.logprobs).toEqual({
      content: [
        {
          token: '\ufffd',
          logprob: -1,
          bytes: [0xc3],
          top_logprobs: [{ token: 'a', logprob: -0.5, bytes: [97] }],
        },
      ],
    });
    const byId = { messages: user('hi'), logprobs: true, top_logprobs: 1, return_tokens_as_token_ids: true };
    expect((await json(CHAT, byId)).body.choices[0]!.logprobs).toMatchObject({
      content: [{ token: `token_id:${0xc3}`, top_logprobs: [{ token: 'token_id:97' }] }],
    });
  });
});

describe('return_token_ids', () => {
  const ids = bytesOf('hé');
  const prompt = bytesOf('ab');

  it('adds the ids of prompt and completion to each choice of /v1/completions', async () => {
    const { json, events } = await start(saying('hé'));
    const body = { prompt: 'ab', n: 2, return_token_ids: true };
    const whole = await json(COMPLETIONS, body);
    const said = { text: 'hé', prompt_token_ids: prompt, token_ids: [...ids, EOS] };
    expect(whole.body.choices).toMatchObject([said, said]);
    const scored = await json(COMPLETIONS, { ...body, n: 1, echo: true, max_tokens: 0 });
    expect(scored.body.choices[0]).toMatchObject({ prompt_token_ids: prompt, token_ids: [] });
    const streamed = await events(COMPLETIONS, body);
    for (const index of [0, 1]) {
      const chunks = streamed.events.flatMap(({ choices }) =>
        choices.filter((choice) => choice.index === index),
      );
      expect(chunks).toMatchObject([
        { text: 'h', prompt_token_ids: prompt, token_ids: ids.slice(0, 1) },
        { text: 'é', token_ids: ids.slice(1) },
        { text: '', token_ids: [EOS], finish_reason: 'stop' },
      ]);
      expect(chunks.filter((chunk) => 'prompt_token_ids' in chunk)).toHaveLength(1);
    }
  });

  it('tells the prompt at once and all tokens in the end where text is held back', async () => {
    const { events } = await start(saying('STO'));
    const body = { prompt: 'ab', stop: 'STOP', return_token_ids: true };
    expect((await events(COMPLETIONS, body)).events.map(({ choices }) => choices[0])).toMatchObject([
      { text: '', prompt_token_ids: prompt, token_ids: [], finish_reason: null },
      { text: 'STO', token_ids: [...bytesOf('STO'), EOS], finish_reason: 'stop' },
    ]);
  });

  it('puts the prompt of /v1/chat/completions beside the choices', async () => {
    const { json, events } = await start(saying('hé'));
    const body = { messages: user('hi'), return_token_ids: true };
    const rendered = bytesOf('user:hi;assistant:');
    expect((await json(CHAT, body)).body).toMatchObject({
      prompt_token_ids: rendered,
      choices: [{ message: { content: 'hé' }, token_ids: [...ids, EOS] }],
    });
    const streamed = (await events(CHAT, body)).events;
    expect(streamed.map((event) => event['prompt_token_ids'])).toEqual([
      rendered,
      undefined,
      undefined,
      undefined,
    ]);
    expect(streamed.slice(1).map(({ choices }) => choices[0])).toMatchObject([
      { delta: { content: 'h' }, token_ids: ids.slice(0, 1) },
      { delta: { content: 'é' }, token_ids: ids.slice(1) },
      { delta: {}, token_ids: [EOS], finish_reason: 'stop' },
    ]);
  });
});

describe('streams', () => {
  it('joined are the whole text, with usage and one finish per choice', async () => {
    const texts = fc.array(fc.constantFrom('a', 'bc', 'EN', 'END', 'é', '🐉', ' '), { maxLength: 8 });
    const { core, json, events } = await start();
    await fc.assert(
      fc.asyncProperty(texts, fc.boolean(), async (pieces, stops) => {
        core.script = saying(pieces.join(''));
        const body = { prompt: ['p', 'q'], n: 2, max_tokens: 99, ...(stops ? { stop: 'END' } : {}) };
        const whole = await json(COMPLETIONS, body);
        const streamed = await events(COMPLETIONS, { ...body, stream_options: { include_usage: true } });
        const joined = ['', '', '', ''];
        const reasons: unknown[] = [];
        for (const event of streamed.events) {
          for (const choice of event.choices) {
            joined[choice.index] += choice.text;
            if (choice.finish_reason !== null) reasons[choice.index] = choice.finish_reason;
          }
        }
        expect(joined).toEqual(whole.body.choices.map((choice) => choice.text));
        expect(reasons).toEqual(['stop', 'stop', 'stop', 'stop']);
        expect(streamed.events.at(-1)!['usage']).toEqual(whole.body['usage']);
        if (stops) for (const text of joined) expect(text).not.toContain('END');
      }),
      { numRuns: 40 },
    );
  });

  it('end the request in the core at a stop string, one completion at a time', async () => {
    const { core, json, client } = await start((request, emit) => {
      for (const token of bytesOf('one STOP two')) emit({ index: 0, tokens: [token] });
      if (request.n > 1) emit({ index: 1, tokens: bytesOf('fine'), finishReason: 'length' });
    });
    const { body } = await json(COMPLETIONS, { prompt: 'p', n: 2, stop: ['STOP', 'never'], max_tokens: 50 });
    expect(body.choices).toMatchObject([
      { text: 'one ', finish_reason: 'stop' },
      { text: 'fine', finish_reason: 'length' },
    ]);
    expect(body['usage']).toMatchObject({ completion_tokens: 8 + 4 });
    expect(core.aborted).toMatchObject([{ index: 0 }]);
    expect(client.pending).toBe(0);
  });

  it('abort every completion in the core when the client goes away', async () => {
    const { core, server, inFlight, client } = await start((_, emit) => emit({ index: 0, tokens: [97] }));
    await server.listen({ port: 0, host: '127.0.0.1' });
    const { port } = server.server.address() as AddressInfo;
    for (const stream of [true, false]) {
      core.received.length = 0;
      const body = JSON.stringify({ prompt: ['a', 'b'], stream });
      const client = httpRequest({
        port,
        path: COMPLETIONS,
        method: 'POST',
        headers: { 'content-type': 'application/json' },
      });
      client.on('error', () => {});
      client.end(body);
      if (stream) await once(client, 'response');
      else await core.until((message) => message.type === 'add');
      client.destroy();
      await core.until(() => core.aborted.length === 2);
    }
    expect(client.pending).toBe(0);
    expect(await inFlight.drain(60_000)).toBe(true);
  });

  it('count first tokens, gaps and whole requests', async () => {
    const { metrics, json, server } = await start(saying('hello'));
    await json(COMPLETIONS, { prompt: 'a', max_tokens: 9 });
    const count = (name: Parameters<typeof readHistogram>[1]) =>
      readHistogram([metrics], name).cumulative.at(-1)!.count;
    expect(count('vllm:time_to_first_token_seconds')).toBe(1);
    expect(count('vllm:inter_token_latency_seconds')).toBe(5);
    expect(count('vllm:e2e_request_latency_seconds')).toBe(1);
    const page = await server.inject({ url: '/metrics' });
    expect(page.body).toContain('vllm:time_to_first_token_seconds_count{model_name="demo"} 1');
    expect(page.body).toContain('vllm:inter_token_latency_seconds_bucket{le="+Inf",model_name="demo"} 5');
  });
});

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
    const { json, post } = await start(failing('KV_LOAD_TIMEOUT'));
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
    const { events, json, core } = await start(failing('INTERNAL', 'so far'));
    const { status, events: all } = await events(COMPLETIONS, { prompt: ['a', 'b'] });
    expect(status).toBe(200);
    expect(all.at(-1)).toMatchObject({ error: { code: 'INTERNAL', message: 'the KV never came' } });
    expect((await json(COMPLETIONS, { prompt: 'a' })).status).toBe(500);
    expect(core.added).toHaveLength(3);
  });

  it('of one prompt abort the others', async () => {
    const { core, json, client } = await start((request, emit) => {
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
    ['stop_token_ids.0', { stop_token_ids: ['x'] }],
    ['presence_penalty', { presence_penalty: 0.5 }],
    ['frequency_penalty', { frequency_penalty: -1 }],
    ['repetition_penalty', { repetition_penalty: 1.1 }],
    ['logit_bias', { logit_bias: { 5: 1 } }],
    ['suffix', { suffix: 'end' }],
    ['stream_options', { stream_options: { include_usage: true } }],
    ['stream', { stream: 'yes' }],
  ])('name the field %s of a completion that is wrong: %j', async (param, change) => {
    const { json, core } = await start();
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
    ['tools', { tools: [{ type: 'function' }] }],
    ['response_format', { response_format: { type: 'json_object' } }],
  ])('name the field %s of a chat that is wrong: %j', async (param, change) => {
    const { json } = await start();
    const { status, body } = await json(CHAT, { messages: user('a'), ...change });
    expect(status).toBe(400);
    expect(body.error).toMatchObject({ param, code: 'REQUEST_INVALID' });
  });

  it('are of their own kind for unknown models, long prompts, broken JSON, other types and paths', async () => {
    const { json, server } = await start();
    const unknown = await json(COMPLETIONS, { model: 'gpt', prompt: 'a' });
    expect(unknown).toMatchObject({
      status: 404,
      body: { error: { code: 'MODEL_NOT_FOUND', param: 'model' } },
    });
    expect((await json(CHAT, { model: 'gpt', messages: user('a') })).status).toBe(404);
    for (const change of [{ prompt: 'x'.repeat(256) }, { prompt: 'x'.repeat(250), max_tokens: 7 }]) {
      const long = await json(COMPLETIONS, change);
      expect(long).toMatchObject({
        status: 400,
        body: { error: { code: 'CONTEXT_EXCEEDED', param: 'prompt' } },
      });
    }
    const huge = await json(CHAT, { messages: user('x'.repeat(100_000)) });
    expect(huge).toMatchObject({ status: 400, body: { error: { code: 'CONTEXT_EXCEEDED' } } });
    expect((await json(COMPLETIONS, '{"prompt": "a"')).status).toBe(400);
    expect((await json(COMPLETIONS, '[1]')).status).toBe(400);
    expect((await json(COMPLETIONS, '')).body.error).toMatchObject({ code: 'REQUEST_INVALID' });
    const type = await json(COMPLETIONS, 'prompt=a', { 'content-type': 'application/x-www-form-urlencoded' });
    expect(type.status).toBe(415);
    const nowhere = await server.inject({ url: '/v1/nothing' });
    expect([nowhere.statusCode, nowhere.json()]).toMatchObject([404, { error: { code: 'REQUEST_INVALID' } }]);
    const big = await json(COMPLETIONS, { prompt: 'x'.repeat(17 * 2 ** 20) });
    expect(big).toMatchObject({ status: 413, body: { error: { code: 'REQUEST_INVALID' } } });
    const notice = await json('/kv/release', { request_id: 'x'.repeat(40_000) });
    expect(notice).toMatchObject({ status: 413, body: { error: { code: 'REQUEST_INVALID' } } });
    expect((await json(COMPLETIONS, '{"prompt":"a","__proto__":{"n":2}}')).status).toBe(400);
  });

  it('refuse an id that is under way or cannot be one', async () => {
    const { core, json } = await start(() => {});
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
  const long = { prompt: Array.from({ length: 200 }, () => 97), stop: 'x'.repeat(5_000) };

  async function startSlow(limits: RequestReaderOptions = {}) {
    const thread = new FakeReaderThread();
    const reader = await RequestReader.start(demoModelDir(), LOG, { ...limits, openThread: () => thread });
    closers.push(() => reader.close());
    thread.emit({ type: 'ready' });
    return { thread, ...(await start(saying('x'), true, undefined, 'both', reader)) };
  }

  it('hold nobody up while they are read, and are answered like others', async () => {
    const { thread, server, json } = await startSlow();
    const pending = json(COMPLETIONS, long);
    await thread.until(1);
    expect((await server.inject({ url: '/version' })).statusCode).toBe(200);
    expect((await json(COMPLETIONS, { prompt: [97] })).status).toBe(200);
    const { served, route, body } = thread.received[0]!;
    thread.emit({ type: 'read', reading: readBody(served, BYTE_MODEL, route, body) });
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
    const { status, headers, body } = await post(COMPLETIONS, { ...long, stop: 'x'.repeat(6_000) });
    expect([status, headers['retry-after']]).toEqual([503, '3']);
    expect(JSON.parse(body)).toMatchObject({ error: { type: 'server_error', code: 'READER_BUSY' } });
    expect(inFlight.size).toBe(1);
    expect((await json(COMPLETIONS, { prompt: [97] })).status).toBe(200);
    const { served, route, body: read } = thread.received[0]!;
    thread.emit({ type: 'read', reading: readBody(served, BYTE_MODEL, route, read) });
    expect((await first).status).toBe(200);
  });

  it('nested deeper than the stack goes have their code', () => {
    const served = { modelNames: ['demo'], maxModelLen: 256, vocabSize: 300 };
    const deep = `{"prompt":"a","tools":${'['.repeat(1e6)}${']'.repeat(1e6)}}`;
    const read = () => readBody(served, BYTE_MODEL, 'completions', new TextEncoder().encode(deep));
    expect(read).toThrow(expect.objectContaining({ code: 'BODY_TOO_COSTLY' }));
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
      readBody(served, model, route, new TextEncoder().encode(JSON.stringify(body)));
    // Four characters a token at most.
    expect(read('completions', { prompt: 'x'.repeat(1_021) })).toThrow(
      'prompt: 1021 characters, at least 256 tokens, and 1 to generate are more than the context of 256',
    );
    expect(read('completions', { prompt: 'x'.repeat(980), max_tokens: 12 })).toThrow('at least 245 tokens');
    expect(read('completions', { prompt: 'x'.repeat(976), max_tokens: 12 })).toThrow('tokenized');
    expect(read('chat', { messages: user('x'.repeat(2_000)) })).toThrow('messages: 2016 characters');
    expect(read('tokenize', { prompt: 'x'.repeat(1_025) })).toThrow('at least 257 tokens, are more than');
    expect(read('tokenize', { prompt: 'x'.repeat(1_024) })).toThrow('tokenized');
  });
});

describe('the rest', () => {
  it('tells its state only where that was asked for, and by default to this machine alone', async () => {
    const ask = async (audience: DebugAudience | undefined, remoteAddress: string) => {
      const { server } = await start(saying('hello'), true, audience);
      const response = await server.inject({ url: '/debug/state', remoteAddress });
      return [response.statusCode, response.json() as Answer] as const;
    };
    expect((await ask(undefined, '127.0.0.1'))[0]).toBe(404);
    for (const local of ['127.0.0.1', '::1', '::ffff:127.0.0.1']) {
      const state = { role: 'both', requests: 0, core: { blocks: { total: 64 } } };
      expect(await ask('loopback', local)).toMatchObject([200, state]);
    }
    for (const remote of ['10.0.0.7', '::ffff:10.0.0.7', 'fd00::1']) {
      expect((await ask('loopback', remote))[0]).toBe(403);
      expect((await ask('anyone', remote))[0]).toBe(200);
    }
  });

  it('lists models, version and health', async () => {
    const { server, inFlight, core, json } = await start();
    const get = async (url: string) => {
      const response = await server.inject({ url });
      return [response.statusCode, response.json() as Answer] as const;
    };
    const [, models] = await get('/v1/models');
    expect(models.data.map((model) => model.id)).toEqual(['demo', 'alias']);
    expect(models.data[0]).toMatchObject({ object: 'model', max_model_len: 256 });
    expect(await get('/version')).toEqual([200, { version: '1.2.3' }]);
    expect(await get('/health')).toEqual([200, { status: 'ok', role: 'both' }]);
    // Who asks every second must not have millions of blocks looked through.
    const asked = core.received.filter(({ type }) => type === 'state');
    expect(asked).toMatchObject([{ integrity: false }]);
    await inFlight.drain(0);
    expect(await get('/health')).toMatchObject([503, { status: 'draining' }]);
    expect(await json(COMPLETIONS, { prompt: 'a' })).toMatchObject({
      status: 503,
      body: { error: { code: 'SERVER_DRAINING' } },
    });
    core.emit({ type: 'fatal', error: { code: 'CUDA_ERROR', message: 'gone', context: {} } });
    expect(await get('/health')).toMatchObject([500, { error: { code: 'CUDA_ERROR' } }]);
  });

  it('tokenizes and back', async () => {
    const { json } = await start();
    expect((await json('/tokenize', { prompt: 'ab', return_token_strs: true })).body).toEqual({
      count: 2,
      max_model_len: 256,
      tokens: [97, 98],
      token_strs: ['a', 'b'],
    });
    const chat = await json('/tokenize', { messages: user('x') });
    expect(chat.body['count']).toBe('user:x;assistant:'.length);
    expect((await json('/detokenize', { tokens: [97, 0xc3, 0xa9] })).body).toEqual({ prompt: 'aé' });
    expect((await json('/detokenize', { tokens: [999] })).status).toBe(400);
    expect((await json('/tokenize', {})).status).toBe(400);
    expect((await json('/tokenize', { prompt: 'a', model: 'gpt' })).status).toBe(404);
  });
});

describe('a request whose prompt is still being computed elsewhere', () => {
  const within = async (role: WorkerConfig['role'], header?: string) => {
    const { core, json } = await start(saying('x'), true, undefined, role);
    const headers = header === undefined ? {} : { 'x-pd-prefill-within': header };
    expect((await json(COMPLETIONS, { prompt: 'Hi' }, headers)).status).toBe(200);
    expect((await json(CHAT, { messages: user('Hi') }, headers)).status).toBe(200);
    const [completion, chat] = core.added.map(({ prefillWithinMs }) => prefillWithinMs);
    expect(chat).toBe(completion);
    return completion;
  };

  it.each([
    ['600000', 600_000],
    ['99999999999', 86_400_000],
    ['0', undefined],
    ['-1', undefined],
    ['1e3', undefined],
    ['soon', undefined],
    [undefined, undefined],
  ] as const)('x-pd-prefill-within: %s lets a consumer wait %s ms longer', async (header, ms) => {
    expect(await within('consumer', header)).toBe(ms);
  });

  it('means nothing to other workers', async () => {
    expect(await within('producer', '600000')).toBeUndefined();
    expect(await within('both', '600000')).toBeUndefined();
  });

  it('is told by /kv/prefilled that it waits no more', async () => {
    const { core, json } = await start();
    const notice = { request_id: 'r', route: '/v1/completions', prompts: 2 };
    expect(await json('/kv/prefilled', notice)).toEqual({ status: 200, body: { prefilled: 2 } });
    expect(core.received.at(-1)).toEqual({ type: 'prefilled', transferIds: ['cmpl-r-0', 'cmpl-r-1'] });
    expect((await json('/kv/prefilled', { ...notice, prompts: 0 })).status).toBe(400);
  });
});
