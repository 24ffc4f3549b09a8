/**
 * What the bodies of several routes have in common: their fields, and what is checked of them. What would change the answer and is not supported
 * is refused by name. Nothing here waits or does I/O (request-body-reader.ts says why).
 */
import { parse } from 'secure-json-parse';
import { PdError } from '../../errors.ts';
import type { GrammarSpec } from '../../grammar/grammar.ts';
import { type Decoding, type TextModel, TextTooLong } from '../../model/tokenizer.ts';
import { checkLevels } from '../../net/json-fields.ts';
import { modelNotFound } from '../../openai-error.ts';
import type { CallDialect } from '../../parsing/calls.ts';
import { type Parsing, parsedTokens } from '../../parsing/parser.ts';
import type { ReasoningDialect } from '../../parsing/reasoning.ts';
import type { SamplingParams } from '../../scheduler/types.ts';
import { z } from '../../zod.ts';

/** Most alternatives per token. */
export const MAX_LOGPROBS = 20;
const MAX_N = 128;
export const MAX_PROMPTS = 1_024;
/** Each goes to the core with each prompt. */
const MAX_STOP_TOKEN_IDS = 1_024;
/** Each is looked up with each token. */
const MAX_BIASES = 1_024;
const MAX_BAD_WORDS = 256;
const MAX_BAD_WORD = 256;
/** Token ids of such fields, of all prompts together: each prompt goes to the core with its own copy. */
const MAX_LISTED = 2 ** 22;
const MAX_STOPS = 16;
const MAX_STOP = 4_096;

export const tokenIds = z.array(z.int().min(0));
export const optional = <T extends z.ZodType>(schema: T) =>
  schema.nullish().transform((value) => value ?? undefined);

/** Fields of OpenAI and vLLM that are not supported, with the values that ask for nothing. */
export const NOT_DONE: Readonly<Record<string, readonly unknown[]>> = {
  length_penalty: [1],
  suffix: [''],
  use_beam_search: [false],
  tools: [[]],
  tool_choice: ['none', 'auto'],
  functions: [[]],
  function_call: ['none', 'auto'],
  guided_whitespace_pattern: [],
  chat_template: [],
  prompt_embeds: [],
  documents: [[]],
  echo: [false],
  audio: [],
  modalities: [['text']],
  web_search_options: [],
  verbosity: ['medium'],
  mm_processor_kwargs: [{}],
  logits_processors: [[]],
  vllm_xargs: [{}],
  cache_salt: [],
};

export const samplingFields = {
  model: optional(z.string()),
  stream: optional(z.boolean()),
  stream_options: optional(
    z.object({ include_usage: optional(z.boolean()), continuous_usage_stats: optional(z.boolean()) }),
  ),
  max_tokens: optional(z.int().min(0)),
  min_tokens: optional(z.int().min(0)),
  temperature: optional(z.number().min(0).max(2)),
  top_p: optional(z.number().gt(0).max(1)),
  top_k: optional(z.int().min(-1)),
  min_p: optional(z.number().min(0).max(1)),
  presence_penalty: optional(z.number().min(-2).max(2)),
  frequency_penalty: optional(z.number().min(-2).max(2)),
  repetition_penalty: optional(z.number().min(0.01).max(100)),
  logit_bias: optional(
    z
      .record(z.string().regex(/^\d{1,15}$/), z.number().min(-100).max(100), {
        error: ({ code }) => (code === 'invalid_key' ? 'expected token ids as keys' : undefined),
      })
      .transform((bias) =>
        Object.entries(bias).map(([token, value]): [number, number] => [Number(token), value]),
      )
      .refine((bias) => bias.length <= MAX_BIASES, `more than ${MAX_BIASES} tokens`),
  ),
  allowed_token_ids: optional(tokenIds.min(1)),
  bad_words: optional(
    z.array(z.string().regex(/\S/, 'a bad word must not be empty').max(MAX_BAD_WORD)).max(MAX_BAD_WORDS),
  ),
  prompt_logprobs: optional(z.int().min(0).max(MAX_LOGPROBS)),
  /** Of 64 bits. JSON has rounded those of more than 53, which are folded into what the core takes. */
  seed: optional(
    z
      .number()
      .min(-(2 ** 63))
      .max(2 ** 63)
      .meta({ type: 'integer' })
      .refine(Number.isInteger, 'expected an integer')
      .transform((seed) => (Number.isSafeInteger(seed) ? seed : seed % Number.MAX_SAFE_INTEGER)),
  ),
  n: optional(z.int().min(1).max(MAX_N)),
  best_of: optional(z.int().min(1)),
  stop: optional(
    z
      .union([z.string(), z.array(z.string()).max(MAX_STOPS)], {
        error: ({ input }) =>
          Array.isArray(input) && input.length > MAX_STOPS
            ? `more than ${MAX_STOPS} stop strings`
            : 'expected a string, or a list of strings',
      })
      .transform((stop) => (typeof stop === 'string' ? [stop] : stop))
      .pipe(
        z.array(
          z
            .string()
            .min(1, 'a stop string must not be empty')
            .max(MAX_STOP, `a stop string has more than ${MAX_STOP} characters`),
        ),
      ),
  ),
  stop_token_ids: optional(tokenIds.max(MAX_STOP_TOKEN_IDS)),
  ignore_eos: optional(z.boolean()),
  return_token_ids: optional(z.boolean()),
  return_tokens_as_token_ids: optional(z.boolean()),
  /** Lower ones go first. */
  priority: optional(
    z
      .int()
      .min(-(2 ** 31))
      .max(2 ** 31 - 1),
  ),
  include_stop_str_in_output: optional(z.boolean()),
  skip_special_tokens: optional(z.boolean()),
  truncate_prompt_tokens: optional(
    z.union([z.int().min(1), z.literal(-1)], 'expected a number of tokens, or -1 for as many as fit'),
  ),
};

export type SamplingBody = z.output<z.ZodObject<typeof samplingFields>>;

/** The fields that say what may be generated, each of which may be long. */
type Constraints = Pick<
  SamplingBody,
  'stop' | 'stop_token_ids' | 'logit_bias' | 'allowed_token_ids' | 'bad_words'
>;

/** What a body is checked against, beside the model's text. */
export interface Served {
  /** The first is the one that answers carry. */
  readonly modelNames: readonly string[];
  /** Most tokens of a sequence, prompt and output. */
  readonly maxModelLen: number;
  readonly vocabSize: number;
  /** Of the one prompt of this request, where whoever sent it has tokenized its text. */
  readonly promptIds?: Uint32Array;
  /** What the other end of the pair generates, which is given the same prompt, where that is known. */
  readonly outputTokens?: number;
  /** How the model writes calls of tools and marks its thoughts; absent where that is not known, or not to be looked at. */
  readonly calls?: CallDialect;
  readonly reasoning?: ReasoningDialect;
}

export interface ReadPrompt {
  /** As given, or decoded from the token ids. Empty where it is not echoed: nobody needs it then. */
  readonly text: string;
  readonly tokens: Int32Array<ArrayBuffer>;
}

/** How tokens become text. */
export interface TextOptions extends Decoding {
  /** What ended the completion, a stop string or token, is part of the text. */
  readonly includeStop?: boolean;
  /** The stop token that is told as the end of the text, not by its id. */
  readonly eos?: number;
  /** How what it says is told apart. Nothing is generated behind the one call that there may be. */
  readonly parsing?: Parsing;
}

/** What a request wants its text to be, and the field that says so. */
export interface GrammarWish {
  readonly spec: GrammarSpec;
  readonly param: string;
  /** What it wants too and cannot have, as it forces a call: nonsense is refused all the same. */
  readonly unused?: GrammarWish | undefined;
}

/** What a completion or chat asks of the core. */
export interface Asked {
  readonly prompts: readonly ReadPrompt[];
  readonly n: number;
  readonly sampling: Omit<SamplingParams, 'maxTokens' | 'seed'> & { readonly seed?: number };
  /** 0 scores the prompt alone (echo). Absent: as many as fit. */
  readonly maxTokens: number | undefined;
  readonly priority: number;
  readonly stops: readonly string[];
  readonly text: TextOptions;
  /** To be built into `sampling.grammar` before it goes to the core. */
  readonly grammarWish?: GrammarWish;
  /** The field that `sampling.grammar` came from. */
  readonly grammarParam?: string;
  readonly echo: boolean;
}

/** The body without what may be long: what its answer is written by. */
export interface Read<Body> {
  readonly body: Omit<Body, 'prompt' | 'messages' | keyof Constraints>;
  readonly model: string;
  readonly asked: Asked;
}

/** A prompt with replacement characters in place of what was sent would be another one. */
const UTF8 = new TextDecoder('utf-8', { fatal: true });

/** Throws REQUEST_INVALID, also where the JSON would set a prototype, or a field is nested too deep. */
export function parseJson(body: Uint8Array): unknown {
  let json: unknown;
  try {
    json = parse(UTF8.decode(body));
  } catch (cause) {
    throw PdError.because('REQUEST_INVALID', 'the body is not valid JSON', cause);
  }
  if (typeof json === 'object' && json !== null && !Array.isArray(json)) {
    checkLevels(Buffer.from(body.buffer, body.byteOffset, body.byteLength));
  }
  return json;
}

/** Characters of what is said of a field: it may repeat what was sent. */
const MOST_SAID = 1_000;

/** REQUEST_INVALID that names `param`. */
export function badField(param: string, message: string): PdError {
  return new PdError('REQUEST_INVALID', `${param}: ${message.slice(0, MOST_SAID)}`, { param });
}

/** The body, or REQUEST_INVALID that names the first field that is wrong and what it may be. */
export function parseBody<T>(schema: z.ZodType<T>, body: unknown, notDone = NOT_DONE): T {
  const known = (schema as Partial<z.ZodObject>).shape ?? {};
  if (typeof body !== 'object' || body === null || Array.isArray(body)) {
    throw new PdError('REQUEST_INVALID', 'the body must be a JSON object');
  }
  for (const [field, neutral] of Object.entries(notDone)) {
    const value = (body as Record<string, unknown>)[field];
    if (value === undefined || value === null || field in known) continue;
    const text = JSON.stringify(value);
    if (!neutral.some((allowed) => JSON.stringify(allowed) === text)) {
      const only =
        neutral.length === 0
          ? 'leave it out'
          : `only ${neutral.map((allowed) => JSON.stringify(allowed)).join(' or ')} is`;
      throw badField(field, `${text.slice(0, 100)} is not supported here; ${only}`);
    }
  }
  const result = schema.safeParse(body);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  const path = issue?.path.map(String).join('.') || 'body';
  throw badField(path.slice(0, 200), issue?.message ?? 'is not allowed');
}

/** A body in two, as nothing that may be long goes on to whoever writes its answer. */
export function splitBody<Body extends Constraints>(
  body: Body,
): [Omit<Body, keyof Constraints>, Constraints] {
  const { stop, stop_token_ids, logit_bias, allowed_token_ids, bad_words, ...rest } = body;
  return [rest, { stop, stop_token_ids, logit_bias, allowed_token_ids, bad_words }];
}

/** Checks that involve more than one field. */
export function checkSampling(
  body: Pick<SamplingBody, 'n' | 'best_of' | 'stream' | 'stream_options' | 'min_tokens' | 'prompt_logprobs'>,
  maxTokens: number | undefined,
): void {
  const n = body.n ?? 1;
  if (body.best_of !== undefined && body.best_of !== n) {
    throw badField('best_of', `${body.best_of} is not supported; only the value of n, ${n}, is`);
  }
  if (body.stream_options !== undefined && body.stream !== true) {
    throw badField('stream_options', 'is allowed only with stream: true');
  }
  if (body.prompt_logprobs !== undefined && body.stream === true) {
    throw badField('prompt_logprobs', 'is not allowed with stream: true');
  }
  if (maxTokens !== undefined && (body.min_tokens ?? 0) > maxTokens) {
    throw badField('min_tokens', `${body.min_tokens} is more than max_tokens, ${maxTokens}`);
  }
}

/** The name that answers carry. Throws MODEL_NOT_FOUND where a request names one that is not served. */
export function servedModel({ modelNames }: Served, requested: string | undefined): string {
  if (requested !== undefined && !modelNames.includes(requested)) throw modelNotFound(requested, modelNames);
  return modelNames[0]!;
}

/**
 * What a checked body asks of the core. `logprobs`: alternatives per token. Throws REQUEST_INVALID for token ids that there are not.
 */
export function askedOf(
  served: Served,
  model: TextModel,
  body: SamplingBody,
  {
    logprobs,
    parsing,
    grammarWish,
    ...own
  }: Pick<Asked, 'prompts' | 'maxTokens' | 'echo'> & {
    readonly logprobs: number | undefined;
    readonly parsing?: Parsing;
    readonly grammarWish?: GrammarWish | undefined;
  },
): Asked {
  const { eosTokenId, eosTokenIds } = model;
  const {
    allowed_token_ids: allowed,
    logit_bias: biases,
    prompt_logprobs = own.echo ? logprobs : undefined,
  } = body;
  if (allowed) checkVocabulary(served, allowed, 'allowed_token_ids');
  if (biases)
    checkVocabulary(
      served,
      biases.map(([token]) => token),
      'logit_bias',
    );
  const badWords = (body.bad_words ?? []).flatMap((word) => spellings(model, word));
  const lists = [allowed, body.stop_token_ids, biases, ...badWords];
  const listed = own.prompts.length * lists.reduce((sum, list) => sum + (list?.length ?? 0), 0);
  if (listed > MAX_LISTED) {
    throw badField(
      'prompt',
      `allowed_token_ids, logit_bias, bad_words and stop_token_ids have ${listed} tokens for all prompts together; at most ${MAX_LISTED} are supported`,
    );
  }
  return {
    ...own,
    n: body.n ?? 1,
    priority: body.priority ?? 0,
    ...(grammarWish && { grammarWish }),
    stops: body.stop ?? [],
    text: {
      skipSpecialTokens: body.skip_special_tokens ?? true,
      includeStop: body.include_stop_str_in_output ?? false,
      ...(!body.ignore_eos && eosTokenId !== undefined && { eos: eosTokenId }),
      ...(parsing && { keep: parsedTokens(parsing), parsing }),
    },
    sampling: {
      temperature: body.temperature ?? 1,
      topP: body.top_p ?? 1,
      topK: Math.max(body.top_k ?? 0, 0),
      ...(body.seed !== undefined && { seed: body.seed }),
      minTokens: body.min_tokens ?? 0,
      stopTokenIds: [...new Set([...(body.ignore_eos ? [] : eosTokenIds), ...(body.stop_token_ids ?? [])])],
      ...(logprobs !== undefined && { logprobs }),
      ...(prompt_logprobs !== undefined && {
        promptLogprobs: Math.max(prompt_logprobs, own.echo ? (logprobs ?? 0) : 0),
      }),
      ...(body.min_p && { minP: body.min_p }),
      ...(body.presence_penalty && { presencePenalty: body.presence_penalty }),
      ...(body.frequency_penalty && { frequencyPenalty: body.frequency_penalty }),
      ...(body.repetition_penalty !== undefined &&
        body.repetition_penalty !== 1 && { repetitionPenalty: body.repetition_penalty }),
      ...(biases && biases.length > 0 && { logitBias: biases }),
      ...(allowed && { allowedTokenIds: [...new Set(allowed)] }),
      ...(badWords.length > 0 && { badWords }),
    },
  };
}

/** The tokens of a bad word, at the beginning of a text and after a space: one list where both end alike. */
function spellings(model: TextModel, word: string): readonly (readonly number[])[] {
  const text = word.trimStart();
  const encode = (spelt: string) => model.encode(spelt, { addSpecialTokens: false });
  const first = encode(text);
  if (first.length === 0) return []; // no token says it, and those of the space alone are not it
  const second = encode(` ${text}`);
  const same = first.every((token, i) => token === second.at(i - first.length));
  return same ? [first] : [first, second];
}

/** How a prompt is brought to tokens. */
interface PromptOptions {
  /** Tokens to generate. */
  readonly output: number;
  /** The field that it came from. */
  readonly param: string;
  /** Keep this many tokens at the end; -1: as many as fit. */
  readonly truncate?: number | undefined;
  /** However many tokens it has, they are wanted. */
  readonly counted?: true;
}

/**
 * Text that is too long however it is tokenized is refused before a tokenizer spends time on it; and of one that is much too long, or cut off
 * at its front, no more is tokenized than must be. Where more than `truncate` tokens are there, so are those given.
 */
export function encodeText(
  served: Served,
  model: TextModel,
  text: string,
  addSpecialTokens: boolean,
  options: PromptOptions,
): readonly number[] {
  if (served.promptIds) return Array.from(served.promptIds);
  const { output, param, truncate, counted } = options;
  const least = Math.ceil(text.length / model.charactersPerToken);
  if (truncate === undefined && least + output > served.maxModelLen) {
    throw contextExceeded(served, param, `${text.length} characters, at least ${least} tokens,`, output);
  }
  if (counted) return model.encode(text, { addSpecialTokens });
  const most = served.maxModelLen - output;
  const kept = keptTokens(served, options);
  const bounds = { most, ...(kept !== undefined && kept <= most && { last: kept + 1 }) };
  try {
    return model.encode(text, { addSpecialTokens, bounds });
  } catch (error) {
    if (!(error instanceof TextTooLong)) throw error;
    throw contextExceeded(served, param, `more than ${error.tokens} prompt tokens`, output);
  }
}

/** Tokens at the end of a prompt that are kept; undefined: all. */
function keptTokens(
  { maxModelLen, outputTokens = 0 }: Served,
  { output, truncate }: PromptOptions,
): number | undefined {
  return truncate === -1 ? Math.max(maxModelLen - Math.max(output, outputTokens), 1) : truncate;
}

/** Checks a tokenized prompt against context and vocabulary. */
export function checkPrompt(
  served: Served,
  tokens: readonly number[],
  options: PromptOptions,
): Int32Array<ArrayBuffer> {
  const { output, param } = options;
  if (tokens.length === 0) throw badField(param, 'is empty: there is nothing to go on from');
  const most = keptTokens(served, options) ?? tokens.length;
  const kept = tokens.length > most ? tokens.slice(-most) : tokens;
  if (kept.length + output > served.maxModelLen) {
    throw contextExceeded(served, param, `${kept.length} prompt tokens`, output);
  }
  checkVocabulary(served, kept, param);
  return Int32Array.from(kept);
}

export function checkVocabulary({ vocabSize }: Served, tokens: readonly number[], param: string): void {
  const unknown = tokens.find((token) => token >= vocabSize);
  if (unknown === undefined) return;
  throw badField(param, `token id ${unknown} is not in the vocabulary of ${vocabSize}`);
}

export function contextExceeded(
  { maxModelLen }: Served,
  param: string,
  what: string,
  output: number,
): PdError {
  const asked = output > 0 ? `${what} and ${output} to generate are` : `${what} are`;
  // In words that clients look for.
  const most = `this model's maximum context length is ${maxModelLen} tokens`;
  return new PdError('CONTEXT_EXCEEDED', `${param}: ${asked} too many: ${most}`, { param });
}
