/** The AI SDK, with its provider for OpenAI (chat and responses) and the one for what is compatible with it. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, isStepCount, Output, streamText, tool } from 'ai';
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
  TWO_CITIES,
  WEATHER,
  weatherOf,
} from './facts.mjs';

const openai = createOpenAI({ baseURL, apiKey });
const models = {
  'openai-compatible': createOpenAICompatible({
    name: 'pd',
    baseURL,
    includeUsage: true,
    supportsStructuredOutputs: true,
  })(model),
  'openai chat': openai.chat(model),
  'openai responses': openai.responses(model),
};
/** Nothing is stored, so the client has to send whole turns. */
const common = { temperature: 0, maxRetries: 0, providerOptions: { openai: { store: false } } };
const weather = tool({
  description: ABOUT,
  inputSchema: z.object({ city: z.string() }),
  execute: async (given) => weatherOf(given),
});

for (const [name, served] of Object.entries(models)) {
  test(`${name}: text, whole and streamed`, async () => {
    const { text, usage, finishReason } = await generateText({ ...common, model: served, prompt: CAPITAL });
    assert.match(text, /Paris/);
    assert.equal(finishReason, 'stop');
    assert(usage.inputTokens > 0 && usage.outputTokens > 0);
    const stream = streamText({ ...common, model: served, system: undefined, prompt: CAPITAL });
    let streamed = '';
    for await (const piece of stream.textStream) streamed += piece;
    assert.equal(streamed, text);
    assert.deepEqual((await stream.usage).outputTokens, usage.outputTokens);
  });

  test(`${name}: tools in several turns, whole and streamed`, async () => {
    const asked = {
      ...common,
      model: served,
      prompt: WEATHER,
      tools: { get_weather: weather },
      stopWhen: isStepCount(3),
    };
    const { text, steps } = await generateText(asked);
    assert.equal(steps.length, 2);
    assert.deepEqual(steps[0].toolCalls[0].input, { city: 'Paris' });
    assertSunny(text);
    const stream = streamText(asked);
    assertSunny(await stream.text);
    assert.equal((await stream.steps)[0].finishReason, 'tool-calls');
  });

  test(`${name}: structured output, whole and streamed`, async () => {
    const schema = z.object({ country: z.string(), capital: z.string() });
    const asked = { ...common, model: served, prompt: IN_JSON, output: Output.object({ schema }) };
    assert.deepEqual((await generateText(asked)).output, OSLO);
    assert.deepEqual(await streamText(asked).output, OSLO);
  });

  test(`${name}: a call that has to be`, async () => {
    const asked = { ...common, model: served, prompt: CAPITAL, tools: { get_weather: weather } };
    for (const toolChoice of ['required', { type: 'tool', toolName: 'get_weather' }]) {
      const { toolCalls } = await generateText({ ...asked, toolChoice });
      assert.equal(toolCalls[0].toolName, 'get_weather');
      assert.equal(toolCalls[0].invalid, undefined);
    }
  });

  test(`${name}: two calls at once`, async () => {
    const { toolCalls } = await generateText({
      ...common,
      model: served,
      prompt: TWO_CITIES,
      tools: { get_weather: weather },
    });
    assert.deepEqual(
      toolCalls.map(({ input }) => input.city),
      ['Paris', 'London'],
    );
  });
}
