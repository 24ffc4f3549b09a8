/** The package `openai`. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import {
  ABOUT,
  apiKey,
  assertSunny,
  baseURL,
  CAPITAL,
  IN_JSON,
  model,
  OSLO,
  PARAMETERS,
  TWO_CITIES,
  WEATHER,
  weatherOf,
} from './facts.mjs';

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const common = { model, temperature: 0, max_tokens: 64 };
const user = (content) => [{ role: 'user', content }];
const tools = [
  { type: 'function', function: { name: 'get_weather', description: ABOUT, parameters: PARAMETERS } },
];
const flatTools = tools.map(({ type, function: declared }) => ({ type, ...declared, strict: false }));

test('models', async () => {
  const { data } = await client.models.list();
  assert.equal(data[0].id, model);
  assert.deepEqual(await client.models.retrieve(model), data[0]);
});

test('chat, whole and streamed, says the same', async () => {
  const whole = await client.chat.completions.create({ ...common, messages: user(CAPITAL) });
  const { content } = whole.choices[0].message;
  assert.match(content, /Paris/);
  assert.equal(whole.choices[0].finish_reason, 'stop');
  assert.equal(whole.choices[0].message.refusal, null);
  assert.equal(whole.usage.completion_tokens_details.reasoning_tokens, 0);
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
  assert.equal(typeof whole.usage.prompt_tokens_details.cached_tokens, 'number');
  const stream = await client.chat.completions.create({
    ...common,
    messages: user(CAPITAL),
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = '';
  let usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? '';
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test('completions', async () => {
  const whole = await client.completions.create({ ...common, prompt: CAPITAL, max_tokens: 8 });
  const stream = await client.completions.create({ ...common, prompt: CAPITAL, max_tokens: 8, stream: true });
  let text = '';
  for await (const chunk of stream) text += chunk.choices[0].text;
  assert.equal(text, whole.choices[0].text);
});

test('several choices, with log-probabilities and stop strings', async () => {
  const { choices } = await client.chat.completions.create({
    ...common,
    messages: user(CAPITAL),
    temperature: 1,
    seed: 7,
    n: 2,
    logprobs: true,
    top_logprobs: 2,
    presence_penalty: 0.5,
    frequency_penalty: 0.5,
    logit_bias: { 5: -100 },
    stop: ['\n'],
  });
  assert.equal(choices.length, 2);
  for (const { logprobs } of choices) assert.equal(logprobs.content[0].top_logprobs.length, 2);
});

test('a tool, called and answered by hand', async () => {
  const messages = user(WEATHER);
  const first = await client.chat.completions.create({ ...common, messages, tools });
  const [{ message, finish_reason }] = first.choices;
  assert.equal(finish_reason, 'tool_calls');
  assert.equal(message.tool_calls[0].function.name, 'get_weather');
  const given = JSON.parse(message.tool_calls[0].function.arguments);
  assert.deepEqual(given, { city: 'Paris' });
  const result = {
    role: 'tool',
    tool_call_id: message.tool_calls[0].id,
    content: JSON.stringify(weatherOf(given)),
  };
  const second = await client.chat.completions.create({
    ...common,
    messages: [...messages, message, result],
    tools,
  });
  assertSunny(second.choices[0].message.content);
});

test('two calls at once, streamed', async () => {
  const stream = client.chat.completions.stream({ ...common, messages: user(TWO_CITIES), tools });
  const { message, finish_reason } = (await stream.finalChatCompletion()).choices[0];
  assert.equal(finish_reason, 'tool_calls');
  const cities = message.tool_calls.map((call) => JSON.parse(call.function.arguments).city);
  assert.deepEqual(cities, ['Paris', 'London']);
  assert.equal(new Set(message.tool_calls.map(({ id }) => id)).size, 2);
});

test('one call at most, whole and streamed', async () => {
  const asked = { ...common, messages: user(TWO_CITIES), tools, parallel_tool_calls: false };
  const whole = await client.chat.completions.create(asked);
  const streamed = await client.chat.completions
    .stream({ ...asked, stream_options: { include_usage: true } })
    .finalChatCompletion();
  for (const { choices, usage } of [whole, streamed]) {
    const [{ message, finish_reason }] = choices;
    assert.equal(finish_reason, 'tool_calls');
    assert.deepEqual(
      message.tool_calls.map((call) => JSON.parse(call.function.arguments).city),
      ['Paris'],
    );
    assert(!message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  }
  const both = await client.chat.completions.create({ ...asked, parallel_tool_calls: true });
  assert(whole.usage.completion_tokens < both.usage.completion_tokens);
});

test('tools run by the client, whole and streamed', async () => {
  const runnable = [
    {
      type: 'function',
      function: {
        name: 'get_weather',
        description: ABOUT,
        parameters: PARAMETERS,
        parse: JSON.parse,
        function: weatherOf,
      },
    },
  ];
  for (const stream of [false, true]) {
    const runner = client.chat.completions.runTools({
      ...common,
      messages: user(WEATHER),
      tools: runnable,
      stream,
    });
    assertSunny(await runner.finalContent());
  }
});

const Answer = z.object({ country: z.string(), capital: z.string() });

test('structured output', async () => {
  const asked = { ...common, messages: user(IN_JSON), response_format: zodResponseFormat(Answer, 'answer') };
  const { choices } = await client.chat.completions.parse(asked);
  assert.deepEqual(choices[0].message.parsed, OSLO);
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.deepEqual(streamed.choices[0].message.parsed, OSLO);
  const text = { format: zodTextFormat(Answer, 'answer') };
  const { output_parsed } = await client.responses.parse({ model, temperature: 0, input: IN_JSON, text });
  assert.deepEqual(output_parsed, OSLO);
});

test('a call that has to be, of any tool and of one', async () => {
  const named = { type: 'function', function: { name: 'get_weather' } };
  for (const tool_choice of ['required', named]) {
    const { choices } = await client.chat.completions.create({
      ...common,
      messages: user(CAPITAL),
      tools,
      tool_choice,
    });
    const [call] = choices[0].message.tool_calls;
    assert.equal(call.function.name, 'get_weather');
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ['city']);
  }
  const forced = { type: 'function', name: 'get_weather' };
  const { output } = await client.responses.create({
    model,
    temperature: 0,
    input: CAPITAL,
    tools: flatTools,
    tool_choice: forced,
    store: false,
  });
  assert.deepEqual(
    output.map(({ type }) => type),
    ['function_call'],
  );
});

test('responses', async () => {
  const whole = await client.responses.create({
    model,
    temperature: 0,
    input: CAPITAL,
    max_output_tokens: 64,
  });
  assert.match(whole.output_text, /Paris/);
  assert.equal(whole.status, 'completed');
  const stream = client.responses.stream({ model, temperature: 0, input: CAPITAL });
  let text = '';
  for await (const event of stream) if (event.type === 'response.output_text.delta') text += event.delta;
  assert.equal(text, whole.output_text);
  assert.equal((await stream.finalResponse()).output_text, text);
});

test('responses with a tool', async () => {
  const input = user(WEATHER);
  const first = await client.responses.create({
    model,
    temperature: 0,
    input,
    tools: flatTools,
    store: false,
  });
  const call = first.output.find(({ type }) => type === 'function_call');
  const output = JSON.stringify(weatherOf(JSON.parse(call.arguments)));
  const answered = [
    ...input,
    ...first.output,
    { type: 'function_call_output', call_id: call.call_id, output },
  ];
  const stream = client.responses.stream({
    model,
    temperature: 0,
    input: answered,
    tools: flatTools,
    store: false,
  });
  assertSunny((await stream.finalResponse()).output_text);
});

test('errors', async () => {
  const refused = (promise, type, param) =>
    assert.rejects(promise, (error) => {
      assert(error instanceof type, String(error));
      assert.equal(error.param, param);
      return true;
    });
  await refused(client.models.retrieve('org/none'), OpenAI.NotFoundError, 'model');
  await assert.rejects(client.completions.create({ model, prompt: 'a '.repeat(1e5) }), {
    code: 'context_length_exceeded',
  });
  await refused(client.embeddings.create({ model, input: 'a' }), OpenAI.NotFoundError, null);
  await refused(
    client.responses.create({ model, input: 'a', previous_response_id: 'resp_1' }),
    OpenAI.BadRequestError,
    'previous_response_id',
  );
  await refused(
    client.chat.completions.create({ ...common, messages: user('a'), best_of: 2 }),
    OpenAI.BadRequestError,
    'best_of',
  );
});
