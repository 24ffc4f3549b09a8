/**
 * From the bytes of a body to what is to be done: JSON, schema, template, tokens, checks. Nothing here waits or does I/O, so the same
 * function runs on the HTTP thread for short bodies and on the reader thread for long ones (request-reader.ts); what it returns is
 * plain data.
 */
import { randomInt } from 'node:crypto';
import { parse } from 'secure-json-parse';
import { PdError } from '../../errors.ts';
import type { SamplingParams } from '../../scheduler/types.ts';
import {
  badField,
  type ChatBody,
  type CompletionBody,
  chatSchema,
  checkSampling,
  completionSchema,
  detokenizeSchema,
  parseBody,
  type SamplingBody,
  tokenizeSchema,
} from './schemas.ts';
import type { ChatMessage, TextModel } from './text.ts';

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
  readonly sampling: Omit<SamplingParams, 'maxTokens'>;
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

/** What comes of a body, by route. The tokenizer's routes need nothing more: theirs is the answer itself, as JSON in UTF-8. */
export interface Readings {
  readonly completions: Read<CompletionBody>;
  readonly chat: Read<ChatBody>;
  readonly tokenize: Uint8Array<ArrayBuffer>;
  readonly detokenize: Uint8Array<ArrayBuffer>;
}

export type Route = keyof Readings;

const READERS: {
  readonly [R in Route]: (served: Served, model: TextModel, body: unknown) => Readings[R];
} = {
  completions: readCompletion,
  chat: readChat,
  tokenize: readTokenize,
  detokenize: readDetokenize,
};

const DEFAULT_MAX_TOKENS = 16;

/** Throws REQUEST_INVALID, MODEL_NOT_FOUND or CONTEXT_EXCEEDED; BODY_TOO_COSTLY where it is nested deeper than the stack goes. */
export function readBody<R extends Route>(
  served: Served,
  model: TextModel,
  route: R,
  body: Uint8Array,
): Readings[R] {
  try {
    return READERS[route](served, model, parseJson(body));
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    throw new PdError('BODY_TOO_COSTLY', `reading the body: ${cause.message}`, {}, { cause });
  }
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

function readCompletion(served: Served, model: TextModel, json: unknown): Read<CompletionBody> {
  const { prompt, stop, stop_token_ids, ...body } = parseBody(completionSchema, json);
  const name = servedModel(served, body.model);
  const echo = body.echo ?? false;
  checkSampling(body, body.max_tokens);
  if (body.max_tokens === 0 && !echo) throw badField('max_tokens', 'must be at least 1 without echo');
  const output = Math.max(body.max_tokens ?? 1, 1);
  const prompts = prompt.map((given, index): ReadPrompt => {
    const param = prompt.length > 1 ? `prompt.${index}` : 'prompt';
    if (typeof given !== 'string') {
      const tokens = checkPrompt(served, given, output, param);
      return { text: echo ? model.decode(given, { skipSpecialTokens: false }) : '', tokens };
    }
    const ids = encodeText(served, model, given, body.add_special_tokens ?? true, output, param);
    return { text: echo ? given : '', tokens: checkPrompt(served, ids, output, param) };
  });
  return {
    body,
    model: name,
    asked: {
      prompts,
      n: body.n ?? 1,
      sampling: samplingOf(model, body, stop_token_ids, body.logprobs, echo),
      maxTokens: body.max_tokens ?? DEFAULT_MAX_TOKENS,
      stops: stop ?? [],
      echo,
    },
  };
}

function readChat(served: Served, model: TextModel, json: unknown): Read<ChatBody> {
  const { messages, stop, stop_token_ids, ...body } = parseBody(chatSchema, json);
  const name = servedModel(served, body.model);
  const maxTokens = body.max_completion_tokens ?? body.max_tokens;
  checkSampling(body, maxTokens);
  if (maxTokens === 0) {
    const field = body.max_completion_tokens === undefined ? 'max_tokens' : 'max_completion_tokens';
    throw badField(field, 'must be at least 1');
  }
  if (body.top_logprobs !== undefined && body.logprobs !== true) {
    throw badField('top_logprobs', 'is allowed only with logprobs: true');
  }
  const output = Math.max(maxTokens ?? 1, 1);
  const text = renderChat(model, messages, body.add_generation_prompt ?? true);
  // The template has written the special tokens itself.
  const ids = encodeText(served, model, text, false, output, 'messages');
  const logprobs = body.logprobs ? (body.top_logprobs ?? 0) : undefined;
  return {
    body,
    model: name,
    asked: {
      prompts: [{ text: '', tokens: checkPrompt(served, ids, output, 'messages') }],
      n: body.n ?? 1,
      sampling: samplingOf(model, body, stop_token_ids, logprobs, false),
      maxTokens,
      stops: stop ?? [],
      echo: false,
    },
  };
}

function readTokenize(served: Served, model: TextModel, json: unknown): Uint8Array<ArrayBuffer> {
  const body = parseBody(tokenizeSchema, json);
  servedModel(served, body.model);
  const { messages, prompt } = body;
  // A chat template writes the special tokens itself.
  const addSpecialTokens = body.add_special_tokens ?? messages === undefined;
  const text = messages ? renderChat(model, messages, body.add_generation_prompt ?? true) : (prompt ?? '');
  const tokens = encodeText(served, model, text, addSpecialTokens, 0, messages ? 'messages' : 'prompt');
  return utf8Json({
    count: tokens.length,
    max_model_len: served.maxModelLen,
    tokens,
    token_strs: body.return_token_strs ? tokens.map((token) => model.tokenString(token)) : null,
  });
}

function readDetokenize(served: Served, model: TextModel, json: unknown): Uint8Array<ArrayBuffer> {
  const body = parseBody(detokenizeSchema, json);
  servedModel(served, body.model);
  checkVocabulary(served, body.tokens, 'tokens');
  return utf8Json({ prompt: model.decode(body.tokens, { skipSpecialTokens: false }) });
}

function utf8Json(answer: object): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(JSON.stringify(answer));
}

/** The name that answers carry. Throws MODEL_NOT_FOUND where a request names one that is not served. */
function servedModel({ modelNames }: Served, requested: string | undefined): string {
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

/** The conversation as the model's template writes it. Throws REQUEST_INVALID where there is none, or where it refuses. */
function renderChat(
  model: TextModel,
  messages: readonly ChatMessage[],
  addGenerationPrompt: boolean,
): string {
  if (!model.hasChatTemplate) throw badField('messages', 'this model has no chat template');
  try {
    return model.applyChatTemplate(messages, { addGenerationPrompt });
  } catch (error) {
    const { message } = PdError.from(error);
    const told = `messages: ${message.slice(0, 1_000)}`;
    throw new PdError('REQUEST_INVALID', told, { param: 'messages' }, { cause: error });
  }
}

/** Sampling parameters of a checked body. `logprobs`: alternatives per token. */
function samplingOf(
  { eosTokenIds }: TextModel,
  body: Omit<SamplingBody, 'stop' | 'stop_token_ids'>,
  stopTokenIds: SamplingBody['stop_token_ids'],
  logprobs: number | undefined,
  echo: boolean,
): Asked['sampling'] {
  return {
    temperature: body.temperature ?? 1,
    topP: body.top_p ?? 1,
    topK: Math.max(body.top_k ?? 0, 0),
    seed: body.seed ?? randomInt(2 ** 31),
    minTokens: body.min_tokens ?? 0,
    stopTokenIds: [...new Set([...(body.ignore_eos ? [] : eosTokenIds), ...(stopTokenIds ?? [])])],
    ...(logprobs === undefined ? {} : { logprobs }),
    ...(logprobs === undefined || !echo ? {} : { promptLogprobs: logprobs }),
  };
}

/** Text that is too long however it is tokenized is refused before a tokenizer spends time on it. `output`: tokens to generate. */
function encodeText(
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
function checkPrompt(
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

function checkVocabulary({ vocabSize }: Served, tokens: readonly number[], param: string): void {
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
