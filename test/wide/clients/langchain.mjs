/** LangChain, over chat completions and over responses. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { HumanMessage } from '@langchain/core/messages';
import { tool } from '@langchain/core/tools';
import { ChatOpenAI, OpenAI } from '@langchain/openai';
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
  WEATHER,
  weatherOf,
} from './facts.mjs';

const common = { model, apiKey, temperature: 0, maxRetries: 0, configuration: { baseURL } };
const weather = tool(async (given) => JSON.stringify(weatherOf(given)), {
  name: 'get_weather',
  description: ABOUT,
  schema: z.object({ city: z.string() }),
});

for (const useResponsesApi of [false, true]) {
  const chat = new ChatOpenAI({ ...common, useResponsesApi, ...(useResponsesApi && { zdrEnabled: true }) });
  const name = useResponsesApi ? 'responses' : 'chat';

  test(`${name}: text, whole and streamed`, async () => {
    const { text, usage_metadata } = await chat.invoke(CAPITAL);
    assert.match(text, /Paris/);
    assert(usage_metadata.output_tokens > 0);
    let streamed = '';
    for await (const chunk of await chat.stream(CAPITAL)) streamed += chunk.text;
    assert.equal(streamed, text);
  });

  test(`${name}: a tool, called and answered`, async () => {
    const bound = chat.bindTools([weather]);
    const question = new HumanMessage(WEATHER);
    const asking = await bound.invoke([question]);
    assert.deepEqual(
      asking.tool_calls.map(({ name, args }) => [name, args]),
      [['get_weather', { city: 'Paris' }]],
    );
    const result = await weather.invoke(asking.tool_calls[0]);
    const { text } = await bound.invoke([question, asking, result]);
    assertSunny(text);
    let streamed;
    for await (const chunk of await bound.stream([question]))
      streamed = streamed ? streamed.concat(chunk) : chunk;
    assert.deepEqual(streamed.tool_calls[0].args, { city: 'Paris' });
  });
}

for (const method of ['jsonSchema', 'functionCalling']) {
  test(`structured output: ${method}`, async () => {
    const schema = z.object({ country: z.string(), capital: z.string() });
    const structured = new ChatOpenAI(common).withStructuredOutput(schema, { name: 'answer', method });
    const answer = await structured.invoke(IN_JSON);
    if (method === 'jsonSchema') assert.deepEqual(answer, OSLO);
    else assert.deepEqual(Object.keys(answer).sort(), ['capital', 'country']); // the function is called, whatever it is about
  });
}

test('completions', async () => {
  const llm = new OpenAI({ ...common, maxTokens: 8 });
  assert((await llm.invoke(CAPITAL)).length > 0);
});
