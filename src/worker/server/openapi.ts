/** /openapi.json: what may be asked, from the very schemas that bodies are checked by. */
import { z } from '../../zod.ts';
import { chatSchema } from './chat.ts';
import { completionSchema, promptForms, prompts } from './completions.ts';
import { NOT_DONE } from './fields.ts';
import { RESPONSES_NOT_DONE, responseSchema } from './responses.ts';
import { detokenizeSchema, tokenizeSchema } from './tokenize.ts';
import { turns } from './turns.ts';

/** Fields that are taken and change nothing: they are about OpenAI's own service, or say what holds here anyway. */
const IGNORED = [
  'guided_decoding_backend',
  'kv_transfer_params',
  'metadata',
  'prediction',
  'prompt_cache_key',
  'prompt_cache_retention',
  'request_id',
  'safety_identifier',
  'service_tier',
  'spaces_between_special_tokens',
  'store',
  'stream_options',
  'user',
] as const;

const GENERATION = {
  '/v1/chat/completions': { schema: chatSchema, notDone: NOT_DONE },
  '/v1/completions': { schema: completionSchema, notDone: NOT_DONE },
  '/v1/responses': { schema: responseSchema, notDone: RESPONSES_NOT_DONE },
} as const;

export type GenerationPath = keyof typeof GENERATION;
export const GENERATION_PATHS = Object.keys(GENERATION) as GenerationPath[];

export type FieldStatus =
  | { readonly is: 'done' | 'ignored' }
  /** `but`: values that ask for nothing. */
  | { readonly is: 'refused'; readonly but: readonly unknown[] };

/** Every field that means something to a route. */
export function fieldsOf(path: GenerationPath): ReadonlyMap<string, FieldStatus> {
  const { schema, notDone } = GENERATION[path];
  const fields = new Map<string, FieldStatus>(
    Object.keys(schema.shape).map((name) => [name, { is: 'done' }]),
  );
  for (const name of IGNORED) if (!fields.has(name)) fields.set(name, { is: 'ignored' });
  for (const [name, but] of Object.entries(notDone))
    if (!fields.has(name)) fields.set(name, { is: 'refused', but });
  return fields;
}

const ERROR = {
  description: 'An error in the form of OpenAI',
  content: {
    'application/json': {
      schema: {
        type: 'object',
        required: ['error'],
        properties: {
          error: {
            type: 'object',
            required: ['message', 'type', 'param', 'code'],
            properties: {
              message: { type: 'string' },
              type: { type: 'string' },
              param: { type: ['string', 'null'], description: 'The field that is wrong' },
              code: { type: 'string', description: 'docs/errors.md lists them' },
            },
          },
        },
      },
    },
  },
};

const GETS = {
  '/v1/models': 'Names that requests may give',
  '/v1/models/{model}': 'One of them',
  '/health': '200 while requests are taken, 503 while the worker drains',
  '/metrics': "Prometheus' text format",
  '/version': 'Version of pd-worker',
};

/** JSON text. In turns: schemas of many fields take some milliseconds each. */
export async function openApi(version: string): Promise<string> {
  const turn = turns();
  const paths: Record<string, object> = {};
  for (const path of GENERATION_PATHS) {
    await turn();
    const { properties, ...schema } = jsonSchema(GENERATION[path].schema);
    const all: Record<string, unknown> = { ...properties };
    for (const [name, status] of fieldsOf(path)) {
      if (status.is === 'ignored') all[name] = { description: 'Taken, and changes nothing' };
      if (status.is === 'refused') {
        all[name] = { enum: [null, ...status.but], description: 'Not done: refused with any other value' };
      }
    }
    const answers = {
      description: 'The answer; with stream: true server-sent events',
      content: { 'application/json': {}, 'text/event-stream': {} },
    };
    paths[path] = post({ ...schema, properties: all }, answers);
  }
  const json = { description: 'The answer', content: { 'application/json': {} } };
  for (const [path, schema] of [
    ['/tokenize', tokenizeSchema],
    ['/detokenize', detokenizeSchema],
  ] as const) {
    await turn();
    paths[path] = post(jsonSchema(schema), json);
  }
  for (const [path, summary] of Object.entries(GETS)) {
    const parameters = [...path.matchAll(/\{(\w+)\}/g)].map(([, name]) => ({
      ...{ name, in: 'path', required: true, schema: { type: 'string' } },
    }));
    const responses = { 200: { description: 'The answer' }, default: ERROR };
    paths[path] = { get: { summary, ...(parameters.length > 0 && { parameters }), responses } };
  }
  return JSON.stringify({ openapi: '3.1.0', info: { title: 'pd-worker', version }, paths });
}

function post(schema: object, answer: object): object {
  const requestBody = { required: true, content: { 'application/json': { schema } } };
  return { post: { requestBody, responses: { 200: answer, default: ERROR } } };
}

/** Of what is sent. */
function jsonSchema(schema: z.ZodType) {
  const { $schema: _, ...json } = z.toJSONSchema(schema, {
    io: 'input',
    unrepresentable: 'any',
    override: ({ zodSchema, jsonSchema: written }) => {
      // Checked by hand, as it may be long.
      if (zodSchema === prompts) Object.assign(written, z.toJSONSchema(promptForms, { io: 'input' }));
    },
  });
  return json;
}
