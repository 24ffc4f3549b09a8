/** /v1/responses, from a body to its answer. */
import { describe, expect, it } from 'vitest';
import { RESPONSES_NOT_DONE, responseSchema } from '../../../src/worker/server/responses.ts';
import { BYTE_MODEL, bytesOf, type Script, saying } from '../../support/fake-core.ts';
import { type Answer, startServer } from '../../support/http-worker.ts';

const RESPONSES = '/v1/responses';
const TOOL = { type: 'function', name: 'f', parameters: {}, strict: true };
const CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>';

const promptOf = (core: { added: { promptTokens: Int32Array }[] }) =>
  BYTE_MODEL.decode(core.added.at(-1)!.promptTokens);
const cutOff: Script = (_, emit) => emit({ index: 0, tokens: bytesOf('so'), finishReason: 'length' });

describe('responses', () => {
  it('have what a model thinks, says and calls as items', async () => {
    const { json, core } = await startServer(saying(`<think>Hm.</think>One moment. ${CALL}`));
    const { status, body } = await json(RESPONSES, {
      input: 'Hi',
      instructions: 'Be kind',
      tools: [TOOL],
      temperature: 0,
      metadata: { a: 'b' },
      prompt_cache_key: 'k',
    });
    expect(promptOf(core)).toMatch(/^tools:.*"name":"f".*;system:Be kind;user:Hi;assistant:$/);
    expect([status, body]).toMatchObject([
      200,
      {
        id: expect.stringMatching(/^resp_/),
        object: 'response',
        status: 'completed',
        incomplete_details: null,
        instructions: 'Be kind',
        tools: [TOOL],
        temperature: 0,
        store: false,
        metadata: { a: 'b' },
        created_at: expect.any(Number),
        completed_at: expect.any(Number),
        ...{ presence_penalty: 0, frequency_penalty: 0, max_tool_calls: null },
        ...{ safety_identifier: null, prompt_cache_key: 'k' },
        output: [
          { type: 'reasoning', summary: [], content: [{ type: 'reasoning_text', text: 'Hm.' }] },
          {
            type: 'message',
            status: 'completed',
            role: 'assistant',
            content: [{ type: 'output_text', text: 'One moment.', annotations: [] }],
          },
          { type: 'function_call', status: 'completed', name: 'f', arguments: '{"a": 1}' },
        ],
        usage: { input_tokens_details: { cached_tokens: 0, cache_write_tokens: 0 } },
      },
    ]);
    const { input_tokens, output_tokens, total_tokens, output_tokens_details } = body['usage'] as {
      [key: string]: number;
    } & { output_tokens_details: { reasoning_tokens: number } };
    expect(total_tokens).toBe(input_tokens! + output_tokens!);
    expect(output_tokens_details.reasoning_tokens).toBeGreaterThan(0);
  });

  it('that are cut off say so', async () => {
    const { json } = await startServer(cutOff);
    expect((await json(RESPONSES, { input: 'Hi', max_output_tokens: 2 })).body).toMatchObject({
      status: 'incomplete',
      completed_at: null,
      incomplete_details: { reason: 'max_output_tokens' },
      output: [{ type: 'message', status: 'incomplete', content: [{ text: 'so' }] }],
    });
  });

  it('go on from items of earlier turns', async () => {
    const { json, core } = await startServer();
    const input = [
      { role: 'user', content: [{ type: 'input_text', text: 'Hi' }] },
      { type: 'reasoning', id: 'rs_1', summary: [], content: [{ type: 'reasoning_text', text: 'hm' }] },
      { type: 'message', role: 'assistant', content: [{ type: 'output_text', text: 'ok' }] },
      { type: 'function_call', call_id: 'c', name: 'f', arguments: '{}' },
      { type: 'function_call', call_id: 'd', name: 'f', arguments: '{}' },
      { type: 'function_call_output', call_id: 'c', output: '42' },
    ];
    expect((await json(RESPONSES, { input })).status).toBe(200);
    expect(promptOf(core)).toMatch(
      /^user:Hi;assistant:<think>hm<\/think>ok\[.*"id":"c".*"id":"d".*\];tool:42;assistant:$/,
    );
  });

  it('stream every step of every item, numbered, and end with the whole', async () => {
    const { post } = await startServer(saying(`<think>Hm.</think>So ${CALL}`));
    const answer = await post(RESPONSES, { input: 'Hi', tools: [TOOL], stream: true });
    expect(answer.headers['content-type']).toMatch(/^text\/event-stream/);
    const events = answer.body
      .split('\n\n')
      .filter((text) => text !== '')
      .map((text) => {
        const [, name, data] = /^event: (.*)\ndata: (.*)$/.exec(text)!;
        const event = JSON.parse(data!) as Answer & { type: string; delta: string; response: object };
        expect(event.type).toBe(name);
        return event;
      });
    expect(events.map((event) => event['sequence_number'])).toEqual(events.map((_, i) => i));
    const steps = events.map(({ type }) => type.replace('response.', ''));
    const around = (delta: string) => [
      'output_item.added',
      ...(delta.startsWith('function') ? [] : ['content_part.added']),
      `${delta}.delta`,
      `${delta}.done`,
      ...(delta.startsWith('function') ? [] : ['content_part.done']),
      'output_item.done',
    ];
    expect(steps.filter((step, i) => step !== steps[i - 1])).toEqual([
      ...['created', 'in_progress'],
      ...around('reasoning_text'),
      ...around('output_text'),
      ...around('function_call_arguments'),
      'completed',
    ]);
    const joined = (type: string) =>
      events.map((event) => (event.type === `response.${type}.delta` ? event.delta : '')).join('');
    expect(['reasoning_text', 'output_text', 'function_call_arguments'].map(joined)).toEqual([
      'Hm.',
      'So',
      '{"a": 1}',
    ]);
    expect(events.at(-1)!.response).toMatchObject({
      output: [{ type: 'reasoning' }, { type: 'message' }, { type: 'function_call', arguments: '{"a": 1}' }],
      usage: { input_tokens: expect.any(Number) },
    });
  });

  it('that fail midway end with an error', async () => {
    const { post } = await startServer((_, emit) => {
      emit({ index: 0, tokens: bytesOf('so far') });
      const error = { code: 'INTERNAL', message: 'gone', context: {} } as const;
      emit({ index: 0, tokens: [], finishReason: 'error', error });
    });
    const { body } = await post(RESPONSES, { input: 'Hi', stream: true });
    const events = body.trim().split('\n\n');
    const [error, failed] = events.slice(-2);
    expect(error).toMatch(/^event: error\ndata: \{"type":"error".*"code":"INTERNAL"/);
    const [, response] = /^event: response.failed\ndata: (.*)$/.exec(failed!)!;
    expect(JSON.parse(response!)).toMatchObject({
      sequence_number: events.length - 1,
      response: { status: 'failed', error: { code: 'server_error', message: 'gone' } },
    });
  });

  it('take null in every field but the input as its default', async () => {
    const { json } = await startServer(saying('Hello'));
    const names = [...Object.keys(responseSchema.shape), ...Object.keys(RESPONSES_NOT_DONE)];
    const nulls = Object.fromEntries(names.map((name) => [name, null]));
    const { status, body } = await json(RESPONSES, { ...nulls, input: 'Hi' });
    expect([status, body]).toMatchObject([200, { status: 'completed', tools: [], tool_choice: 'auto' }]);
  });

  it.each([
    ['previous_response_id', { previous_response_id: 'resp_1' }],
    ['background', { background: true }],
    ['conversation', { conversation: 'conv_1' }],
    ['input', { input: [] }],
    ['input.0.content', { input: [{ role: 'user', content: [{ type: 'input_image', image_url: 'x' }] }] }],
    ['input.0', { input: [{ type: 'item_reference', id: 'msg_1' }] }],
    ['input.0.output', { input: [{ type: 'function_call_output', call_id: 'c', content: '42' }] }],
    ['input.0.output', { input: [{ type: 'function_call_output', call_id: 'c', output: { a: 1 } }] }],
    [
      'input.0.output',
      { input: [{ type: 'function_call_output', call_id: 'c', output: [{ type: 'input_image' }] }] },
    ],
    ['input.0', { input: [{ type: 'computer_call' }] }],
    ['tools.0.type', { tools: [{ type: 'web_search' }] }],
    ['max_output_tokens', { max_output_tokens: 0 }],
    ['text.verbosity', { text: { verbosity: 'low' } }],
    ['text.format.schema', { text: { format: { type: 'json_schema', name: 'n' } } }],
    ['metadata', { metadata: JSON.parse('['.repeat(600) + ']'.repeat(600)) as object }],
    ['tools', { tools: [{ ...TOOL, description: 'x'.repeat(2 ** 20) }], tool_choice: 'none' }],
    ['input', { input: 'x'.repeat(300) }],
  ])('name what is wrong: %s', async (param, change) => {
    const { json, core } = await startServer();
    const { status, body } = await json(RESPONSES, { input: 'a', ...change });
    expect([status, body.error]).toMatchObject([400, { param, type: 'invalid_request_error' }]);
    if ('input' in change && change.input.length > 100)
      expect(body.error).toMatchObject({ code: 'context_length_exceeded' });
    expect(core.added).toEqual([]);
  });
});

it.each([
  { type: 'allowed_tools', mode: 'auto', tools: [] },
  { type: 'function' },
  { type: 'function', function: { name: 'f' } },
  'any',
])('says how a tool is chosen in this API: not %j', async (tool_choice) => {
  const { json } = await startServer();
  const { status, body } = await json(RESPONSES, { input: 'a', tools: [TOOL], tool_choice });
  const message = expect.stringMatching(
    /^tool_choice: expected .* or \{"type": "function", "name": \.\.\.\}$/,
  );
  expect([status, body.error]).toEqual([
    400,
    { message, type: 'invalid_request_error', param: 'tool_choice', code: 'REQUEST_INVALID' },
  ]);
});

it('answers 404 in the form of OpenAI for what a text model has not', async () => {
  const { json } = await startServer();
  const { status, body } = await json('/v1/embeddings', { input: 'a' });
  expect([status, body]).toMatchObject([
    404,
    {
      error: {
        type: 'invalid_request_error',
        param: null,
        message: expect.stringContaining('/v1/embeddings'),
      },
    },
  ]);
});
