/**
 * From the bytes of a client's body to what the proxy needs of it. Nothing here waits or does I/O, so the same function runs on the
 * main thread for short bodies and on a thread for long ones (body-reader.ts).
 */
import { PdError } from '../errors.ts';

type JsonObject = Readonly<Record<string, unknown>>;

export interface RequestBody {
  /** As it came, byte for byte: the consumer gets it. Only this may be used from now on; the memory that was read may have moved. */
  readonly original: Uint8Array<ArrayBuffer>;
  /** Which model is asked for, if any. */
  readonly model: string | undefined;
  readonly prompts: number;
  /** The producer's: the same prompts, one token, nothing that only the answer needs. JSON in UTF-8. */
  readonly prefill: Uint8Array<ArrayBuffer>;
  /** A producer's whose first token the consumer takes over: with all that the token and its log-probabilities depend on. May be `prefill`. */
  readonly nativePrefill: Uint8Array<ArrayBuffer>;
}

/** Throws REQUEST_INVALID where it is no JSON object; BODY_TOO_COSTLY where it is nested deeper than the stack goes. */
export function readBody(original: Uint8Array<ArrayBuffer>): RequestBody {
  const json = parseObject(original);
  const { model } = json;
  const prefill = encode(prefillCopy(json));
  const drawnBy = drawnByFields(json);
  return {
    original,
    model: typeof model === 'string' ? model : undefined,
    prompts: countPrompts(json['prompt']),
    prefill,
    nativePrefill: drawnBy ? encode({ ...prefillCopy(json), ...drawnBy }) : prefill,
  };
}

function parseObject({ buffer, byteOffset, byteLength }: Uint8Array<ArrayBuffer>): JsonObject {
  let json: unknown;
  try {
    json = JSON.parse(Buffer.from(buffer, byteOffset, byteLength).toString('utf8'));
  } catch (error) {
    throw new PdError('REQUEST_INVALID', `the body is not JSON: ${(error as Error).message}`);
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw new PdError('REQUEST_INVALID', 'the body must be a JSON object');
  }
  return json as JsonObject;
}

function encode(json: JsonObject): Uint8Array<ArrayBuffer> {
  try {
    return new TextEncoder().encode(JSON.stringify(json));
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    throw new PdError('BODY_TOO_COSTLY', `copying the body: ${cause.message}`, {}, { cause });
  }
}

/** Only the answer needs them, and servers reject some of them with `max_tokens` 1 or without streaming. */
const DROPPED = [
  'min_tokens',
  'logprobs',
  'top_logprobs',
  'prompt_logprobs',
  'return_token_ids',
  'return_tokens_as_token_ids',
  'stream_options',
] as const;

/** Set only where present: their defaults are these values, and a server may reject a field it does not know. */
const REPLACED = { max_completion_tokens: 1, stream: false, n: 1, best_of: 1, echo: false } as const;

/** Leaves `body` as it is. */
function prefillCopy(body: JsonObject): JsonObject {
  const copy: Record<string, unknown> = { ...body, max_tokens: 1 };
  for (const field of DROPPED) delete copy[field];
  for (const [field, value] of Object.entries(REPLACED)) if (field in copy) copy[field] = value;
  return copy;
}

/** Of what a prefill copy drops: what the first token is drawn by, and told with. */
const DRAWN_BY = ['min_tokens', 'logprobs', 'top_logprobs'] as const;

function drawnByFields(body: JsonObject): JsonObject | undefined {
  const present = DRAWN_BY.filter((field) => field in body);
  if (present.length === 0) return undefined;
  const kept: Record<string, unknown> = {};
  for (const field of present) kept[field] = body[field];
  // Of one token: whether it may be a stop token at all.
  if (typeof kept['min_tokens'] === 'number') kept['min_tokens'] = Math.min(kept['min_tokens'], 1);
  return kept;
}

function countPrompts(prompt: unknown): number {
  const many = Array.isArray(prompt) && typeof prompt[0] !== 'number';
  return many ? Math.max(1, prompt.length) : 1;
}
