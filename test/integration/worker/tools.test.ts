/** Calls of tools and thoughts, from a body to its answer. */
import { describe, expect, it } from 'vitest';
import { BYTE_MODEL, bytesOf, saying } from '../../support/fake-core.ts';
import { type Answer, CHAT, startServer, user } from '../../support/http-worker.ts';

const tool = (name: string) => ({ type: 'function', function: { name, parameters: { type: 'object' } } });
/** Keys in any order, which is that of the prompt. */
const TOOLS = [
  { function: { parameters: { type: 'object' }, name: 'weather' }, type: 'function' },
  tool('f'),
];
const CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>';
const OTHER = '\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>';
const asking = { messages: user('?'), tools: TOOLS };
const called = (name: string, text: string) => ({
  id: expect.stringMatching(/^call_\w{24}$/),
  type: 'function',
  function: { name, arguments: text },
});

const SAID = { role: 'assistant', refusal: null, annotations: [] };
const messageOf = (body: Answer) => (body.choices[0] as unknown as { message: object }).message;
const promptOf = (core: { added: { promptTokens: Int32Array }[] }) =>
  BYTE_MODEL.decode(core.added.at(-1)!.promptTokens);

describe('tools', () => {
  it('are shown to the model, and its calls come out beside what it says', async () => {
    const { json, core } = await startServer(saying(`I look.\n${CALL}${OTHER}`));
    const { body } = await json(CHAT, asking);
    expect(promptOf(core)).toBe(`tools:${JSON.stringify(TOOLS)};user:?;assistant:`);
    expect(messageOf(body)).toEqual({
      ...SAID,
      content: 'I look.',
      tool_calls: [called('weather', '{"city": "Paris"}'), called('f', '{}')],
    });
    expect(body.choices[0]!.finish_reason).toBe('tool_calls');
  });

  it('end what is generated behind the first where there may be one, whole and streamed', async () => {
    const first = `<think>f?</think>I look. ${CALL}`;
    // Nothing else ends it.
    const { json, events, core } = await startServer((request, emit) => {
      for (let index = 0; index < request.n; index++)
        for (const token of bytesOf(`${first}${OTHER} Done.`)) emit({ index, tokens: [token] });
    });
    const one = { ...asking, parallel_tool_calls: false, return_token_ids: true, n: 2 };
    const { body } = await json(CHAT, one);
    const ended = { finish_reason: 'tool_calls', stop_reason: null };
    const message = { content: 'I look.', tool_calls: [called('weather', '{"city": "Paris"}')] };
    const whole = { ...ended, message, token_ids: bytesOf(first) };
    expect(body.choices).toMatchObject([whole, whole]);
    expect(body['usage']).toMatchObject({ completion_tokens: 2 * first.length });
    expect(core.aborted.map(({ index }) => index)).toEqual([0, 1]);
    const streamed = await events(CHAT, { ...one, stream_options: { include_usage: true } });
    const chunks = streamed.events.flatMap(({ choices }) => choices.filter(({ index }) => index === 1));
    expect(chunks.at(-1)).toMatchObject(ended);
    expect(chunks.flatMap((chunk) => (chunk as { token_ids?: number[] }).token_ids ?? [])).toEqual(
      bytesOf(first),
    );
    expect(JSON.stringify(chunks)).not.toContain('"name":"f"');
    expect(streamed.events.at(-1)!['usage']).toEqual(body['usage']);
    const tools = [{ type: 'function', name: 'weather' }];
    const items = await json('/v1/responses', { input: '?', tools, parallel_tool_calls: false });
    expect(items.body['output']).toMatchObject([
      { type: 'reasoning' },
      { type: 'message', status: 'completed' },
      { type: 'function_call', status: 'completed', arguments: '{"city": "Paris"}' },
    ]);
    // Without tools nothing is a call.
    const plain = await json(CHAT, {
      messages: user('?'),
      parallel_tool_calls: false,
      max_tokens: 9,
      stop: 'Done',
    });
    expect(messageOf(plain.body)).toMatchObject({ content: `I look. ${CALL}${OTHER} ` });
  });

  it('stream: a name first, then arguments in pieces, under one id', async () => {
    const { events } = await startServer(saying(`${CALL}${OTHER}`));
    const { events: all } = await events(CHAT, asking);
    type Delta = {
      tool_calls?: { index: number; id?: string; function: { name?: string; arguments: string } }[];
    };
    const deltas = all.flatMap(({ choices }) => (choices[0]!.delta as Delta).tool_calls ?? []);
    const first = deltas.filter(({ id }) => id !== undefined);
    expect(first).toEqual([
      { index: 0, ...called('weather', '') },
      { index: 1, ...called('f', '') },
    ]);
    const text = (index: number) =>
      deltas.map((delta) => (delta.index === index ? delta.function.arguments : '')).join('');
    expect([text(0), text(1)]).toEqual(['{"city": "Paris"}', '{}']);
    expect(deltas.length).toBeGreaterThan(10);
    expect(all.at(-1)!.choices[0]).toMatchObject({ delta: {}, finish_reason: 'tool_calls' });
  });

  it('that break off are text in a whole answer', async () => {
    const text = '<tool_call>\n{"name": "f", "arguments": {"a": "b';
    const { json } = await startServer(saying(text));
    const { body } = await json(CHAT, asking);
    expect(messageOf(body)).toEqual({ ...SAID, content: text });
    expect(body.choices[0]!.finish_reason).toBe('stop');
  });

  it('are kept from the model, and no calls are read, where it may not call any', async () => {
    const { json, core } = await startServer(saying(CALL));
    for (const body of [
      { ...asking, tool_choice: 'none' },
      { messages: user('?') },
      { ...asking, tools: [] },
    ]) {
      expect(messageOf((await json(CHAT, body)).body)).toEqual({ ...SAID, content: CALL });
      expect(promptOf(core)).toBe('user:?;assistant:');
    }
  });

  it('have a history: arguments as objects, results, and who said what', async () => {
    const { json, core } = await startServer();
    const call = { id: 'call_1', type: 'function', function: { name: 'f', arguments: '{"a": [1]}' } };
    const messages = [
      {
        role: 'developer',
        content: [
          { type: 'text', text: 'Be' },
          { type: 'text', text: 'kind' },
        ],
      },
      { role: 'assistant', content: null, tool_calls: [call], reasoning: 'hm' },
      { role: 'tool', tool_call_id: 'call_1', content: '42' },
      { role: 'assistant', content: 'ok', tool_calls: null },
    ];
    expect((await json(CHAT, { messages })).status).toBe(200);
    const written = JSON.stringify([
      { type: 'function', function: { name: 'f', arguments: { a: [1] } }, id: 'call_1' },
    ]);
    expect(promptOf(core)).toBe(
      `system:Be\nkind;assistant:<think>hm</think>${written};tool:42;assistant:ok;assistant:`,
    );
  });

  it.each([
    ['tools.0.function.name', { tools: [{ type: 'function', function: {} }] }],
    ['tools.0.function.name', { tools: [tool('a b')] }],
    ['tools.0.type', { tools: [{ type: 'web_search' }] }],
    ['tools', { tools: Array.from({ length: 10_000 }, (_, i) => tool(`f${i}`)) }],
    ['tool_choice', { tool_choice: 'required' }],
    ['tool_choice', { tools: TOOLS, tool_choice: { type: 'function', function: { name: 'other' } } }],
    ['tool_choice', { tools: TOOLS, tool_choice: 'maybe' }],
    [
      'messages.0.tool_calls.0.function.arguments',
      { messages: [{ role: 'assistant', tool_calls: [{ function: { name: 'f', arguments: '[' } }] }] },
    ],
    ['continue_final_message', { continue_final_message: true, add_generation_prompt: true }],
  ])('name what is wrong: %s', async (param, change) => {
    const { json } = await startServer();
    const { status, body } = await json(CHAT, { messages: user('a'), ...change });
    expect([status, body.error]).toMatchObject([400, { param, code: 'REQUEST_INVALID' }]);
  });
});

describe('thoughts', () => {
  it('come apart from the answer, whole and streamed', async () => {
    const { json, events } = await startServer(saying(`<think>\nWell.\n</think>\n\nParis ${CALL}`));
    const { body } = await json(CHAT, asking);
    expect(messageOf(body)).toMatchObject({
      content: 'Paris',
      reasoning_content: 'Well.',
      reasoning: 'Well.',
      tool_calls: [{ function: { name: 'weather' } }],
    });
    const { completion_tokens_details } = body['usage'] as Record<string, object>;
    expect(completion_tokens_details).toEqual({ reasoning_tokens: 'Well.\n</think>\n\n'.length });
    const streamed = await events(CHAT, { ...asking, stream_options: { include_usage: true } });
    expect(streamed.events.at(-1)!['usage']).toMatchObject({ completion_tokens_details });
    const quiet = await json(CHAT, { messages: user('?'), include_reasoning: false });
    expect(messageOf(quiet.body)).toEqual({ ...SAID, content: `Paris ${CALL}` });
    type Delta = { reasoning_content?: string; reasoning?: string; content?: string };
    const deltas = (await events(CHAT, asking)).events.map(({ choices }) => choices[0]!.delta as Delta);
    const of = (key: keyof Delta) => deltas.map((delta) => delta[key] ?? '').join('');
    expect([of('reasoning_content'), of('reasoning'), of('content')]).toEqual(['Well.', 'Well.', 'Paris']);
  });

  it('may be opened by the template, which takes variables', async () => {
    const { json, core } = await startServer(saying('Well.</think>Paris'));
    const { body } = await json(CHAT, { messages: user('?'), chat_template_kwargs: { thinking: true } });
    expect(promptOf(core)).toBe('user:?;assistant:<think>');
    expect(messageOf(body)).toMatchObject({ content: 'Paris', reasoning_content: 'Well.' });
    const cut = await json(CHAT, {
      messages: user('?'),
      chat_template_kwargs: { thinking: true },
      stop: '</',
    });
    expect(messageOf(cut.body)).toMatchObject({ content: null, reasoning_content: 'Well.' });
  });
});
