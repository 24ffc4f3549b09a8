/** What these clients ask the demo model, and what they know of its answers. The server is at PD_BASE_URL. */
import assert from 'node:assert/strict';

export const baseURL = `${process.env.PD_BASE_URL}/v1`;
export const apiKey = 'none';
export const model = 'demo';

export const CAPITAL = 'What is the capital of France?';
export const WEATHER = 'What is the weather in Paris?';
export const TWO_CITIES = 'What is the weather in Paris and London?';

/** Asks for JSON of the schema below it. */
export const IN_JSON = 'What is the capital of Norway? Answer in JSON with country and capital.';
export const OSLO = { country: 'Norway', capital: 'Oslo' };

/** As a program answers a call. */
export const weatherOf = ({ city }) => ({
  city,
  temperature: city === 'Paris' ? 18 : 11,
  condition: 'sunny',
});

/** What the model makes of it. */
export function assertSunny(text) {
  assert.match(text, /18/);
  assert.match(text, /sunny/);
}

/** The function as JSON schema. */
export const PARAMETERS = {
  type: 'object',
  properties: { city: { type: 'string' } },
  required: ['city'],
  additionalProperties: false,
};
export const ABOUT = 'Current weather of a city';
