/** Completions and chats: what they answer, whole and as streams. */
import { once } from 'node:events';
import { request as httpRequest } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { WorkerConfig } from '../../../src/config/worker-config.ts';
import { readHistogram } from '../../../src/observability/metrics.ts';
import { packLogprobs } from '../../../src/scheduler/prompt-logprobs.ts';
import type { TokenLogprob } from '../../../src/wire/token-logprob.ts';
import { BYTE_MODEL, bytesOf, EOS, type Script, saying } from '../../support/fake-core.ts';

import { CHAT, COMPLETIONS, startServer, user } from '../../support/http-worker.ts';

it('keeps the end of a prompt that is to be cut', async () => {
  const { json, core } = await startServer();
  const asked = async (url: string, body: object) => {
    expect((await json(url, body)).status).toBe(200);
    return BYTE_MODEL.decode(core.added.at(-1)!.promptTokens);
  };
  const long = 'x'.repeat(300);
  expect(await asked(COMPLETIONS, { prompt: `${long}end`, truncate_prompt_tokens: 3 })).toBe('end');
  const fits = { prompt: `${long}end`, truncate_prompt_tokens: -1, max_tokens: 6 };
  expect(await asked(COMPLETIONS, fits)).toHaveLength(250);
  expect(await asked(CHAT, { messages: user(long), truncate_prompt_tokens: 5 })).toBe('tant:');
});

describe('/v1/completions', () => {
  it('answers in the form of OpenAI', async () => {
    const { core, json } = await startServer();
    const { status, body } = await json(COMPLETIONS, { model: 'demo', prompt: 'abc', max_tokens: 32 });
    expect(status).toBe(200);
    expect(body).toEqual({
      id: expect.stringMatching(/^cmpl-[0-9a-f]{32}$/),
      object: 'text_completion',
      created: expect.any(Number),
      model: 'demo',
      system_fingerprint: 'fp_dddddddddddd',
      choices: [{ index: 0, text: 'hello', logprobs: null, finish_reason: 'stop', stop_reason: null }],
      usage: {
        prompt_tokens: 3,
        completion_tokens: 6,
        total_tokens: 9,
        prompt_tokens_details: { cached_tokens: 0 },
      },
    });
    expect(core.added[0]).toMatchObject({
      requestId: expect.stringMatching(/^cmpl-[0-9a-f]{32}-0-[0-9a-f]{8}$/),
      promptTokens: Int32Array.from(bytesOf('abc')),
      n: 1,
      sampling: { temperature: 1, topP: 1, topK: 0, maxTokens: 32, minTokens: 0, stopTokenIds: [EOS] },
    });
  });

  it('keeps the request id, with the index of the prompt behind it', async () => {
    const { core, json, post } = await startServer();
    const id = `___prefill_addr_[::1]:8082___decode_addr_10.0.0.2:8084_${'a'.repeat(32)}`;
    const { body } = await json(COMPLETIONS, { prompt: ['a', 'b'], max_tokens: 9 }, { 'x-request-id': id });
    expect(body['id']).toBe(`cmpl-${id}`);
    expect(core.added.map(({ requestId }) => requestId.slice(0, -8))).toEqual([
      `cmpl-${id}-0-`,
      `cmpl-${id}-1-`,
    ]);
    const plain = await startServer(saying('x'), { randomizeRequestIds: false });
    await plain.json(CHAT, { messages: user('a') }, { 'x-request-id': id });
    expect(plain.core.added[0]!.requestId).toBe(`chatcmpl-${id}`);
    expect(
      (await post(COMPLETIONS, { prompt: 'a' }, { 'x-request-id': 'mine' })).headers['x-request-id'],
    ).toBe('mine');
  });

  it('hands every sampling field to the core', async () => {
    const { core, json } = await startServer();
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

  it('hands over everything that shapes the draw, and nothing where a field says what is so anyway', async () => {
    const { core, json } = await startServer();
    const { status } = await json(COMPLETIONS, {
      prompt: 'abc',
      min_p: 0.05,
      presence_penalty: 0.5,
      frequency_penalty: -0.5,
      repetition_penalty: 1.1,
      logit_bias: { 5: 1.5, 97: -100 },
      allowed_token_ids: [5, 97, 5],
      bad_words: ['ab', 'c'],
    });
    expect(status).toBe(200);
    expect(core.added[0]!.sampling).toMatchObject({
      minP: 0.05,
      presencePenalty: 0.5,
      frequencyPenalty: -0.5,
      repetitionPenalty: 1.1,
      logitBias: [
        [5, 1.5],
        [97, -100],
      ],
      allowedTokenIds: [5, 97],
      badWords: [[...bytesOf('ab')], [...bytesOf('c')]],
    });
    const nothing = { min_p: 0, presence_penalty: 0, frequency_penalty: null, repetition_penalty: 1 };
    await json(COMPLETIONS, { prompt: 'abc', ...nothing, logit_bias: {}, bad_words: [] });
    await json(COMPLETIONS, { prompt: 'abc' });
    expect(Object.keys(core.added[1]!.sampling)).toEqual(Object.keys(core.added[2]!.sampling));
  });

  it('tells what the model says of each prompt token, as vLLM does', async () => {
    const { core, json } = await startServer((request, emit) => {
      const top = [
        { token: 98, logprob: -0.5 },
        { token: 99, logprob: -1 },
      ];
      const entries = [{ token: 97, logprob: -3, rank: 7, top }];
      emit({
        index: 0,
        tokens: [...bytesOf('x')],
        finishReason: 'length',
        promptLogprobs: packLogprobs(entries),
      });
      expect(request.sampling.promptLogprobs).toBe(1);
    });
    const expected = [
      null,
      {
        97: { logprob: -3, rank: 7, decoded_token: 'a' },
        98: { logprob: -0.5, rank: 1, decoded_token: 'b' },
      },
    ];
    const completion = await json(COMPLETIONS, { prompt: 'ba', prompt_logprobs: 1 });
    expect(completion.body.choices[0]).toMatchObject({ text: 'x', prompt_logprobs: expected });
    const chat = await json(CHAT, { messages: [{ role: 'user', content: 'a' }], prompt_logprobs: 1 });
    expect(chat.body).toMatchObject({ prompt_logprobs: expected });
    expect(core.added).toHaveLength(2);
  });

  it('generates 16 tokens where not told, and never past the context', async () => {
    const { core, json } = await startServer();
    await json(COMPLETIONS, { prompt: 'abc' });
    await json(COMPLETIONS, { prompt: 'x'.repeat(250) });
    expect(core.added.map(({ sampling }) => sampling.maxTokens)).toEqual([16, 6]);
  });

  it('answers several prompts and several completions of each, in order', async () => {
    const { json } = await startServer((request, emit) => {
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
    expect(body['usage']).toEqual({
      prompt_tokens: 2,
      completion_tokens: 8,
      total_tokens: 10,
      prompt_tokens_details: { cached_tokens: 0 },
    });
  });

  it('echoes prompts, and scores them with max_tokens 0', async () => {
    const { core, json, events } = await startServer();
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
    const { core, json, events } = await startServer((request, emit) => {
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
    const { core, json } = await startServer();
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
      service_tier: 'default',
      system_fingerprint: 'fp_dddddddddddd',
      choices: [
        {
          index: 0,
          message: { role: 'assistant', content: 'hello', refusal: null, annotations: [] },
          logprobs: null,
          finish_reason: 'stop',
          stop_reason: null,
        },
      ],
      usage: {
        prompt_tokens: 34,
        completion_tokens: 6,
        total_tokens: 40,
        prompt_tokens_details: { cached_tokens: 0 },
        completion_tokens_details: { reasoning_tokens: 0 },
      },
    });
    expect(BYTE_MODEL.decode([...core.added[0]!.promptTokens])).toBe('system:be brief;user:hi;assistant:');
    expect(core.added[0]!.sampling.maxTokens).toBe(20);
    await json(CHAT, { messages: user('hi') });
    expect(core.added[1]!.sampling.maxTokens).toBe(256 - 'user:hi;assistant:'.length);
  });

  it('streams role, text, finish and usage', async () => {
    const { events } = await startServer(saying('hé'));
    const { events: chunks } = await events(CHAT, {
      messages: user('hi'),
      stream_options: { include_usage: true },
    });
    expect(
      chunks.map((chunk) => chunk.choices.map((choice) => [choice.delta, choice.finish_reason])),
    ).toEqual([
      [[{ role: 'assistant', content: '', refusal: null }, null]],
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
      {
        prompt_tokens: 18,
        completion_tokens: 4,
        total_tokens: 22,
        prompt_tokens_details: { cached_tokens: 0 },
        completion_tokens_details: { reasoning_tokens: 0 },
      },
    ]);
    expect(new Set(chunks.map((chunk) => chunk['id'])).size).toBe(1);
    expect(new Set(chunks.map((chunk) => chunk['system_fingerprint']))).toEqual(new Set(['fp_dddddddddddd']));
    expect(chunks[0]!['object']).toBe('chat.completion.chunk');
  });

  it('gives log-probabilities with bytes', async () => {
    const { json, core } = await startServer((_, emit) =>
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
      refusal: null,
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
    const { json, events } = await startServer(saying('hé'));
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
    const { events } = await startServer(saying('STO'));
    const body = { prompt: 'ab', stop: 'STOP', return_token_ids: true };
    expect((await events(COMPLETIONS, body)).events.map(({ choices }) => choices[0])).toMatchObject([
      { text: '', prompt_token_ids: prompt, token_ids: [], finish_reason: null },
      { text: 'STO', token_ids: [...bytesOf('STO'), EOS], finish_reason: 'stop' },
    ]);
  });

  it('puts the prompt of /v1/chat/completions beside the choices', async () => {
    const { json, events } = await startServer(saying('hé'));
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
    const { core, json, events } = await startServer();
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

  it('and whole answers tell what stopped them, as vLLM does', async () => {
    const stopping = (token: number): Script => {
      return (_, emit) => emit({ index: 0, tokens: [...bytesOf('one.two'), token], finishReason: 'stop' });
    };
    for (const [token, stop, ended] of [
      [EOS, {}, null],
      [257, { stop_token_ids: [257] }, 257],
      [EOS, { stop_token_ids: [EOS], ignore_eos: true }, EOS],
      [257, { stop: ['!', '.'] }, '.'],
    ] as const) {
      const { json, events } = await startServer(stopping(token));
      for (const [url, asked] of [
        [COMPLETIONS, { prompt: 'p' }],
        [CHAT, { messages: user('p') }],
      ] as const) {
        const body = { ...asked, ...stop };
        const told = { finish_reason: 'stop', stop_reason: ended };
        expect((await json(url, body)).body.choices[0]).toMatchObject(told);
        const chunks = (await events(url, body)).events.map(({ choices }) => choices[0]!);
        expect(chunks.pop()).toMatchObject(told);
        for (const chunk of chunks) expect(chunk).not.toHaveProperty('stop_reason');
      }
    }
  });

  it('end the request in the core at a stop string, one completion at a time', async () => {
    const { core, json, client } = await startServer((request, emit) => {
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
    const { core, server, inFlight, client } = await startServer((_, emit) =>
      emit({ index: 0, tokens: [97] }),
    );
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

  it('abort what a client had sent one behind the other on a connection, and not only what is answered first', async () => {
    const { core, server, inFlight } = await startServer((_, emit) => emit({ index: 0, tokens: [97] }));
    await server.listen({ port: 0, host: '127.0.0.1' });
    const { port } = server.server.address() as AddressInfo;
    const body = JSON.stringify({ prompt: 'a', stream: true });
    const head = `POST ${COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}`;
    const client = connect(port, '127.0.0.1');
    client.write(`${head}\r\n\r\n${body}`.repeat(3));
    await core.until(() => core.added.length === 3);
    client.destroy();
    await core.until(() => core.aborted.length === 3);
    expect(await inFlight.drain(60_000)).toBe(true);
  });

  it('count first tokens, gaps and whole requests', async () => {
    const { metrics, json, server } = await startServer(saying('hello'));
    await json(COMPLETIONS, { prompt: 'a', max_tokens: 9 });
    const count = (name: Parameters<typeof readHistogram>[1]) =>
      readHistogram([metrics], name).cumulative.at(-1)!.count;
    expect(count('vllm:time_to_first_token_seconds')).toBe(1);
    expect(count('vllm:inter_token_latency_seconds')).toBe(5);
    expect(count('vllm:e2e_request_latency_seconds')).toBe(1);
    const page = await server.inject({ url: '/metrics' });
    expect(page.body).toContain('vllm:time_to_first_token_seconds_count{model_name="demo"} 1');
    expect(page.body).toContain('vllm:inter_token_latency_seconds_bucket{le="+Inf",model_name="demo"} 5');
    expect(page.body).toMatch(
      /^vllm:cache_config_info\{block_size="\d+",cache_dtype="auto",num_gpu_blocks="\d+",/m,
    );
  });
});

describe('a request whose prompt is still being computed elsewhere', () => {
  const within = async (role: WorkerConfig['role'], header?: string) => {
    const { core, json } = await startServer(saying('x'), { role });
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
    const { core, json } = await startServer();
    const notice = { request_id: 'r', route: '/v1/completions', prompts: 2 };
    expect(await json('/kv/prefilled', notice)).toEqual({ status: 200, body: { prefilled: 2 } });
    expect(core.received.at(-1)).toEqual({ type: 'prefilled', transferIds: ['cmpl-r-0', 'cmpl-r-1'] });
    expect((await json('/kv/prefilled', { ...notice, prompts: 0 })).status).toBe(400);
  });
});
