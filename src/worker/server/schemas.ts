/** The bodies that the server takes, checked at the door. What changes the answer and is not done here is refused by name. */

import { PdError } from '../../errors.ts';
import { z } from '../../zod.ts';

/** Most alternatives per token. */
export const MAX_LOGPROBS = 20;
const MAX_N = 128;
export const MAX_PROMPTS = 1_024;
/** Each goes to the core with each prompt. */
const MAX_STOP_TOKEN_IDS = 1_024;

const tokenIds = z.array(z.int().min(0));
const optional = <T extends z.ZodType>(schema: T) =>
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

const sampling = {
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

const promptForms = z
  .union([z.string(), z.array(z.string()).min(1), tokenIds.min(1), z.array(tokenIds.min(1)).min(1)], {
    error: 'expected a string, a list of strings, a list of token ids, or a list of lists of token ids',
  })
  .transform((prompt): readonly (string | readonly number[])[] => {
    if (typeof prompt === 'string') return [prompt];
    return typeof prompt[0] === 'number' ? [prompt as number[]] : (prompt as string[] | number[][]);
  })
  .refine((list) => list.length <= MAX_PROMPTS, `more than ${MAX_PROMPTS} prompts`);

/** One list of ids comes often and long, and a union of schemas tries each form on every id. */
const prompts = z.unknown().transform((prompt, context): readonly (string | readonly number[])[] => {
  if (isIds(prompt)) return [prompt];
  const { success, data, error } = promptForms.safeParse(prompt);
  if (success) return data;
  for (const { message, path } of error.issues) {
    context.addIssue({ code: 'custom', message, path: path as (string | number)[] });
  }
  return z.NEVER;
});

function isIds(value: unknown): value is readonly number[] {
  return Array.isArray(value) && value.length > 0 && value.every((id) => Number.isSafeInteger(id) && id >= 0);
}

export const completionSchema = z.object({
  ...sampling,
  prompt: prompts,
  echo: optional(z.boolean()),
  logprobs: optional(z.int().min(0).max(MAX_LOGPROBS)),
  add_special_tokens: optional(z.boolean()),
});

/** Content as text, or as parts of which only text is read here. */
const content = z
  .union([z.string(), z.array(z.object({ type: z.literal('text'), text: z.string() })), z.null()], {
    error: 'expected text, or a list of {"type": "text"} parts',
  })
  .optional()
  .transform((value) =>
    typeof value === 'string' ? value : (value ?? []).map((part) => part.text).join('\n'),
  );

export const messagesSchema = z.array(z.looseObject({ role: z.string().min(1), content })).min(1);

export const chatSchema = z.object({
  ...sampling,
  messages: messagesSchema,
  max_completion_tokens: optional(z.int().min(0)),
  logprobs: optional(z.boolean()),
  top_logprobs: optional(z.int().min(0).max(MAX_LOGPROBS)),
  add_generation_prompt: optional(z.boolean()),
});

export const tokenizeSchema = z
  .object({
    model: optional(z.string()),
    prompt: optional(z.string()),
    messages: optional(messagesSchema),
    add_special_tokens: optional(z.boolean()),
    add_generation_prompt: optional(z.boolean()),
    return_token_strs: optional(z.boolean()),
  })
  .refine((body) => (body.prompt === undefined) !== (body.messages === undefined), {
    message: 'expected either prompt or messages',
    path: ['prompt'],
  });

export const detokenizeSchema = z.object({ model: optional(z.string()), tokens: tokenIds });

export type CompletionBody = z.output<typeof completionSchema>;
export type ChatBody = z.output<typeof chatSchema>;
export type SamplingBody = Pick<CompletionBody, keyof typeof sampling>;

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

/** Checks that hang on more than one field. */
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
