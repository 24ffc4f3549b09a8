/**
 * What the bodies of several routes have in common: their fields, and what is checked of them. What changes the answer and is not done here
 * is refused by name. Nothing here waits or does I/O (request-reader.ts says why).
 */
import { parse } from 'secure-json-parse';
import { PdError } from '../../errors.ts';
import type { TextModel } from '../../model/tokenizer.ts';
import type { SamplingParams } from '../../scheduler/types.ts';
import { z } from '../../zod.ts';

/** Most alternatives per token. */
export const MAX_LOGPROBS = 20;
const MAX_N = 128;
export const MAX_PROMPTS = 1_024;
/** Each goes to the core with each prompt. */
const MAX_STOP_TOKEN_IDS = 1_024;

export const tokenIds = z.array(z.int().min(0));
export const optional = <T extends z.ZodType>(schema: T) =>
  schema.nullish().transform((value) => value ?? undefined);

/** Fields of OpenAI and vLLM that are not done, with the values that ask for nothing. */
const NOT_DONE: Readonly<Record<string, readonly unknown[]>> = {
  presence_penalty: [0],
  frequency_penalty: [0],
  repetition_penalty: [1],
  length_penalty: [1],
  min_p: [0],
  logit_bias: [{}],
  suffix: [''],
  use_beam_search: [false],
  include_stop_str_in_output: [false],
  skip_special_tokens: [true],
  prompt_logprobs: [],
  truncate_prompt_tokens: [],
  tools: [[]],
  tool_choice: ['none', 'auto'],
  functions: [[]],
  function_call: ['none', 'auto'],
  response_format: [{ type: 'text' }],
  structured_outputs: [],
  guided_json: [],
  guided_regex: [],
  guided_choice: [],
  guided_grammar: [],
  chat_template: [],
  continue_final_message: [false],
  prompt_embeds: [],
};

export const samplingFields = {
  model: optional(z.string()),
  stream: optional(z.boolean()),
  stream_options: optional(z.object({ include_usage: optional(z.boolean()) })),
  max_tokens: optional(z.int().min(0)),
  min_tokens: optional(z.int().min(0)),
  temperature: optional(z.number().min(0).max(2)),
  top_p: optional(z.number().gt(0).max(1)),
  top_k: optional(z.int().min(-1)),
  seed: optional(z.int()),
  n: optional(z.int().min(1).max(MAX_N)),
  best_of: optional(z.int().min(1)),
  stop: optional(
    z
      .union([z.string(), z.array(z.string()).max(16)])
      .transform((stop) => (typeof stop === 'string' ? [stop] : stop))
      .pipe(z.array(z.string().min(1, 'a stop string must not be empty'))),
  ),
  stop_token_ids: optional(tokenIds.max(MAX_STOP_TOKEN_IDS)),
  ignore_eos: optional(z.boolean()),
  return_token_ids: optional(z.boolean()),
  return_tokens_as_token_ids: optional(z.boolean()),
};

export type SamplingBody = z.output<z.ZodObject<typeof samplingFields>>;

/** What a body is checked against, beside the model's text. */
export interface Served {
  /** The first is the one that answers carry. */
  readonly modelNames: readonly string[];
  /** Most tokens of a sequence, prompt and output. */
  readonly maxModelLen: number;
  readonly vocabSize: number;
}

export interface ReadPrompt {
  /** As given, or decoded from the token ids. Empty where it is not echoed: nobody needs it then. */
  readonly text: string;
  readonly tokens: Int32Array<ArrayBuffer>;
}

/** What a completion or chat asks of the core. */
export interface Asked {
  readonly prompts: readonly ReadPrompt[];
  readonly n: number;
  readonly sampling: Omit<SamplingParams, 'maxTokens' | 'seed'> & { readonly seed?: number };
  /** 0 scores the prompt alone (echo). Absent: as many as fit. */
  readonly maxTokens: number | undefined;
  readonly stops: readonly string[];
  readonly echo: boolean;
}

/** The body without what may be long: what its answer is written by. */
export interface Read<Body> {
  readonly body: Omit<Body, 'prompt' | 'messages' | 'stop' | 'stop_token_ids'>;
  readonly model: string;
  readonly asked: Asked;
}

/** Throws REQUEST_INVALID, also where the JSON would set a prototype. */
export function parseJson(body: Uint8Array): unknown {
  try {
    return parse(Buffer.from(body.buffer, body.byteOffset, body.byteLength).toString());
  } catch (cause) {
    const { message } = PdError.from(cause);
    throw new PdError('REQUEST_INVALID', `the body is not valid JSON: ${message}`, {}, { cause });
  }
}

/** REQUEST_INVALID that names `param`. */
export function badField(param: string, message: string): PdError {
  return new PdError('REQUEST_INVALID', `${param}: ${message}`, { param });
}

/** The body, or REQUEST_INVALID that names the first field that is wrong and what it may be. */
export function parseBody<T>(schema: z.ZodType<T>, body: unknown): T {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    throw new PdError('REQUEST_INVALID', 'the body must be a JSON object');
  }
  for (const [field, neutral] of Object.entries(NOT_DONE)) {
    const value = (body as Record<string, unknown>)[field];
    if (value === undefined || value === null) continue;
    const text = JSON.stringify(value);
    if (!neutral.some((allowed) => JSON.stringify(allowed) === text)) {
      const only = neutral.length === 0 ? 'leave it out' : `only ${JSON.stringify(neutral[0])} is`;
      throw badField(field, `${text.slice(0, 100)} is not supported here; ${only}`);
    }
  }
  const result = schema.safeParse(body);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  const path = issue?.path.map(String).join('.') || 'body';
  throw badField(path, issue?.message ?? 'is not allowed');
}

/** Checks that involve more than one field. */
export function checkSampling(
  body: Pick<SamplingBody, 'n' | 'best_of' | 'stream' | 'stream_options' | 'min_tokens'>,
  maxTokens: number | undefined,
): void {
  const n = body.n ?? 1;
  if (body.best_of !== undefined && body.best_of !== n) {
    throw badField('best_of', `${body.best_of} is not supported; only the value of n, ${n}, is`);
  }
  if (body.stream_options !== undefined && body.stream !== true) {
    throw badField('stream_options', 'is allowed only with stream: true');
  }
  if (maxTokens !== undefined && (body.min_tokens ?? 0) > maxTokens) {
    throw badField('min_tokens', `${body.min_tokens} is more than max_tokens, ${maxTokens}`);
  }
}

/** The name that answers carry. Throws MODEL_NOT_FOUND where a request names one that is not served. */
export function servedModel({ modelNames }: Served, requested: string | undefined): string {
  if (requested !== undefined && !modelNames.includes(requested)) {
    const name = JSON.stringify(requested.slice(0, 200));
    throw new PdError(
      'MODEL_NOT_FOUND',
      `model ${name} is not served here; served: ${modelNames.join(', ')}`,
      { param: 'model' },
    );
  }
  return modelNames[0]!;
}

/** What a checked body asks of the core. `logprobs`: alternatives per token. */
export function askedOf(
  { eosTokenIds }: TextModel,
  body: SamplingBody,
  {
    logprobs,
    ...own
  }: Pick<Asked, 'prompts' | 'maxTokens' | 'echo'> & { readonly logprobs: number | undefined },
): Asked {
  return {
    ...own,
    n: body.n ?? 1,
    stops: body.stop ?? [],
    sampling: {
      temperature: body.temperature ?? 1,
      topP: body.top_p ?? 1,
      topK: Math.max(body.top_k ?? 0, 0),
      ...(body.seed !== undefined && { seed: body.seed }),
      minTokens: body.min_tokens ?? 0,
      stopTokenIds: [...new Set([...(body.ignore_eos ? [] : eosTokenIds), ...(body.stop_token_ids ?? [])])],
      ...(logprobs !== undefined && { logprobs }),
      ...(logprobs !== undefined && own.echo && { promptLogprobs: logprobs }),
    },
  };
}

/** Text that is too long however it is tokenized is refused before a tokenizer spends time on it. `output`: tokens to generate. */
export function encodeText(
  served: Served,
  model: TextModel,
  text: string,
  addSpecialTokens: boolean,
  output: number,
  param: string,
): readonly number[] {
  const least = Math.ceil(text.length / model.charactersPerToken);
  if (least + output > served.maxModelLen) {
    throw contextExceeded(served, param, `${text.length} characters, at least ${least} tokens,`, output);
  }
  return model.encode(text, { addSpecialTokens });
}

/** Checks a tokenized prompt against context and vocabulary. `param` names the field that it came from. */
export function checkPrompt(
  served: Served,
  tokens: readonly number[],
  output: number,
  param: string,
): Int32Array<ArrayBuffer> {
  if (tokens.length === 0) throw badField(param, 'is empty: there is nothing to go on from');
  if (tokens.length + output > served.maxModelLen) {
    throw contextExceeded(served, param, `${tokens.length} prompt tokens`, output);
  }
  checkVocabulary(served, tokens, param);
  return Int32Array.from(tokens);
}

export function checkVocabulary({ vocabSize }: Served, tokens: readonly number[], param: string): void {
  const unknown = tokens.find((token) => token >= vocabSize);
  if (unknown === undefined) return;
  throw badField(param, `token id ${unknown} is not in the vocabulary of ${vocabSize}`);
}

function contextExceeded({ maxModelLen }: Served, param: string, what: string, output: number): PdError {
  const asked = output > 0 ? `${what} and ${output} to generate are` : `${what} are`;
  return new PdError('CONTEXT_EXCEEDED', `${param}: ${asked} more than the context of ${maxModelLen}`, {
    param,
  });
}
