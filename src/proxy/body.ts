/**
 * From the bytes of a client's body to what the proxy needs of it. Who reads them: the main thread, which relays all streams, where they are
 * short; a thread of its own (body-thread.ts) where long, and where their prompts are to be tokenized. A prompt is tokenized only while the
 * thread has little to do: then the request goes on without. The function that reads is the same on both, and neither waits nor does I/O.
 */
import type { Signal } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { type BlockHash, extendHashes, keyOf } from '../kv/block-hash.ts';
import { fieldsOf, type JsonField, withFields } from '../net/json-fields.ts';
import type { Logger } from '../observability/log.ts';
import { copyOf, openReader, type ReaderPort, type ReadingLimits, ReadingThread } from '../reading-thread.ts';
import { threadEntry } from '../thread-entry.ts';
import type { BlockKey } from '../wire/kv-events.ts';
import { ReadingTurns } from './reading-turns.ts';
import { BYTES_PER_TOKEN, textKeys } from './text-index.ts';

type JsonObject = Readonly<Record<string, unknown>>;

/** What decides where a request goes. */
export interface PromptFacts {
  /** Which model is asked for, if any. */
  readonly model: string | undefined;
  readonly prompts: number;
  /** How many tokens they have together; without ids about, and the rest of the body counts as prompt. */
  readonly tokens: number;
  /** It is a text that has been tokenized here. */
  readonly tokenized: boolean;
  /** Of its text, where asked for and where there is one prompt: as in text-index.ts. */
  readonly textKeys: readonly number[];
  /** Of its blocks by their size, where asked for and where its token ids are known. */
  readonly blockKeys: ReadonlyMap<number, readonly BlockKey[]>;
}

export interface RequestBody extends PromptFacts {
  /** As it came, byte for byte: the consumer gets it. Only this may be used from now on; the memory that was read may have moved. */
  readonly original: Uint8Array<ArrayBuffer>;
  /** Of its one prompt, a text that has been tokenized here. */
  readonly ids?: Uint32Array<ArrayBuffer>;
  /** `tokens` were counted. */
  readonly tokensKnown: boolean;
  /** Its answer is to come as a stream of events. */
  readonly streamed: boolean;
  /** The body's `user`, if any. */
  readonly user: string | undefined;
  /** The body's `priority`, 0 where it is none. */
  readonly priority: number;
  /** Tokens to generate, where it depends on them how much of the prompt is kept: the copies ask for one. */
  readonly outputTokens?: number;
  /** The producer's: the same prompts, one token, nothing that only the answer needs. JSON in UTF-8. */
  readonly prefill: Uint8Array<ArrayBuffer>;
  /** A producer's whose first token the consumer takes over: with all that the token and its log-probabilities depend on. May be `prefill`. */
  readonly nativePrefill: Uint8Array<ArrayBuffer>;
}

/** What placement wants to know of a prompt, which costs time. */
export interface WantedKeys {
  readonly text: boolean;
  /** In tokens; few. */
  readonly blockSizes: readonly number[];
  /** Ids of a prompt that is text: there are workers that make the same of it. */
  readonly ids: boolean;
}

export const NO_KEYS: WantedKeys = { text: false, blockSizes: [], ids: false };

/** `workerData` of the thread. */
export interface BodyThreadInit {
  /** Directory of the checkpoint whose tokenizer it loads. */
  readonly tokenizer: string | undefined;
}

export interface ToBodyThread {
  readonly body: Uint8Array<ArrayBuffer>;
  readonly wanted: WantedKeys;
  /** The path that it came to: its prompt is to be tokenized. */
  readonly tokenize?: string;
}

/**
 * Bytes of a body that is read at once. Measured on a 2-core VM: 64 KiB of text take 0.2 ms, of token ids 2 ms with the keys of their blocks,
 * of junk up to 5 ms, where it is thousands of fields or nested as deep as may be. So prompts of some ten thousand tokens do not pay the way
 * to the thread.
 */
const SHORT_BODY = 65_536;
/** Longer prompts are not tokenized here: the thread would be theirs for a second. */
const LONGEST_TOKENIZED = 2 ** 20;
/** Bytes before a body in the thread beyond which it does not wait for its tokens: some 50 ms of a tokenizer's time. */
const MOST_AHEAD = 131_072;

export interface BodyReaderOptions extends ReadingLimits {
  /** Bytes up to which a body is read without the thread. */
  readonly shortBody?: number;
  /** Directory of a checkpoint. Absent: nothing is tokenized. */
  readonly tokenizer?: string | undefined;
  readonly onTokenized?: (result: Tokenized) => void;
  readonly openThread?: () => ReaderPort<ToBodyThread, RequestBody>;
}

/** What became of a prompt that was to be tokenized; `none`: it is no text, or the worker will refuse it. */
export type Tokenized = 'done' | 'none' | 'busy' | 'failed';

/** Without a tokenizer there is no thread until the first long body. Close it. */
export class BodyReader {
  readonly #thread: ReadingThread<ToBodyThread, RequestBody>;
  readonly #shortBody: number;
  readonly #onTokenized: ((result: Tokenized) => void) | undefined;
  readonly #tokenizes: boolean;
  readonly #turns = new ReadingTurns();

  constructor(log: Logger, options: BodyReaderOptions = {}) {
    const { shortBody = SHORT_BODY, tokenizer, onTokenized, ...limits } = options;
    const { openThread: open = () => openThread({ tokenizer }), ...rest } = limits;
    this.#shortBody = shortBody;
    this.#onTokenized = onTokenized;
    this.#tokenizes = tokenizer !== undefined;
    this.#thread = new ReadingThread({ ...rest, owner: 'proxy', log, open });
    // Loading a tokenizer takes a second.
    if (this.#tokenizes) this.#thread.start();
  }

  /**
   * `body` is not to be used any more: its memory may move. `path`: the one that it came to. Throws what `readBody` and
   * `ReadingThread.read` throw.
   */
  async read(
    body: Uint8Array<ArrayBuffer>,
    signal: Signal,
    wanted = NO_KEYS,
    path?: string,
  ): Promise<RequestBody> {
    const short = body.byteLength <= this.#shortBody;
    if (this.#tokenizes && wanted.ids && path !== undefined && body.byteLength <= LONGEST_TOKENIZED) {
      if (this.#thread.bytesAhead <= MOST_AHEAD) return await this.#tokenized(body, signal, wanted, path);
      this.#onTokenized?.('busy');
    }
    if (short) {
      await this.#turns.begin(body.byteLength);
      return readBody(body, wanted);
    }
    return await this.#thread.read({ body, wanted }, signal);
  }

  /** Ends the thread; what waits or is being read fails with SERVER_DRAINING. Idempotent. */
  close(): Promise<void> {
    return this.#thread.close();
  }

  async #tokenized(
    body: Uint8Array<ArrayBuffer>,
    signal: Signal,
    wanted: WantedKeys,
    tokenize: string,
  ): Promise<RequestBody> {
    // The thread takes the memory along, and may not come back.
    const kept = body.byteLength <= this.#shortBody ? copyOf(body) : undefined;
    try {
      const read = await this.#thread.read({ body, wanted, tokenize }, signal);
      this.#onTokenized?.(read.ids ? 'done' : 'none');
      return read;
    } catch (error) {
      const { code } = PdError.from(error);
      if (!kept || !THREADS_OWN.has(code)) throw error;
      this.#onTokenized?.('failed');
      return readBody(kept, wanted);
    }
  }
}

/** What a thread fails with that says nothing of the body. */
const THREADS_OWN: ReadonlySet<string> = new Set([
  'READER_BUSY',
  'BODY_TOO_COSTLY',
  'INTERNAL',
  'CHECKPOINT_INVALID',
  'MODEL_UNSUPPORTED',
]);

function openThread(init: BodyThreadInit): ReaderPort<ToBodyThread, RequestBody> {
  return openReader(threadEntry(import.meta.url, './body-thread.js'), init);
}

/**
 * `tokenize`: ids of the body's one prompt, a text, for the model that it asks for; undefined where there are none. Throws REQUEST_INVALID
 * where it is no JSON object, or nested too deep.
 */
export function readBody(
  original: Uint8Array<ArrayBuffer>,
  wanted: WantedKeys = NO_KEYS,
  tokenize?: (model: string | undefined) => Uint32Array<ArrayBuffer> | undefined,
): RequestBody {
  const json = parseObject(original);
  const { user, priority } = json;
  const model = typeof json['model'] === 'string' ? json['model'] : undefined;
  const prompts = countPrompts(json['prompt']);
  const bytes = Buffer.from(original.buffer, original.byteOffset, original.byteLength);
  const fields = fieldsOf(bytes);
  const changes = prefillChanges(json);
  const prefill = withFields(bytes, fields, changes);
  const native = nativeChanges(json, changes);
  const given = isTokenIds(json['prompt']) ? json['prompt'] : undefined;
  // How much is cut off at the front depends on the worker.
  const whole = !given && prompts === 1 && (json['truncate_prompt_tokens'] ?? undefined) === undefined;
  const ids = whole ? tokenize?.(model) : undefined;
  const known = given ?? ids;
  const outputTokens = json['truncate_prompt_tokens'] === -1 ? outputTokensOf(json) : undefined;
  return {
    original,
    model,
    prompts,
    tokens: known?.length ?? Math.ceil(original.byteLength / BYTES_PER_TOKEN),
    tokensKnown: known !== undefined,
    streamed: json['stream'] === true,
    tokenized: ids !== undefined,
    ...(ids && { ids }),
    user: typeof user === 'string' ? user : undefined,
    priority: Number.isSafeInteger(priority) ? (priority as number) : 0,
    ...(outputTokens !== undefined && { outputTokens }),
    textKeys:
      wanted.text && prompts === 1
        ? textKeys(given ? bytesOfIds(given) : promptText(bytes, fields), model ?? '')
        : [],
    blockKeys: new Map(wanted.blockSizes.map((size) => [size, known ? keysOfIds(known, size) : []])),
    prefill,
    nativePrefill: native ? withFields(bytes, fields, native) : prefill,
  };
}

/** As workers read it: a byte order mark is passed over, and what is no UTF-8 is refused. */
const UTF8 = new TextDecoder('utf-8', { fatal: true });

function parseObject(body: Uint8Array<ArrayBuffer>): JsonObject {
  let json: unknown;
  try {
    json = JSON.parse(UTF8.decode(body));
  } catch (error) {
    throw new PdError('REQUEST_INVALID', `the body is not JSON: ${(error as Error).message}`);
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw new PdError('REQUEST_INVALID', 'the body must be a JSON object');
  }
  return json as JsonObject;
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
const REPLACED = {
  max_completion_tokens: 1,
  max_output_tokens: 1,
  stream: false,
  n: 1,
  best_of: 1,
  echo: false,
} as const;

function prefillChanges(body: JsonObject): ReadonlyMap<string, unknown> {
  const changes = new Map<string, unknown>();
  for (const field of DROPPED) if (field in body) changes.set(field, undefined);
  for (const [field, value] of Object.entries(REPLACED)) if (field in body) changes.set(field, value);
  return changes.set('max_tokens', 1);
}

/** Of what a prefill copy drops: what the first token is drawn by, and told with. */
const DRAWN_BY = ['min_tokens', 'logprobs', 'top_logprobs'] as const;

/** The changes that leave it in; undefined where there is nothing of it. */
function nativeChanges(
  body: JsonObject,
  changes: ReadonlyMap<string, unknown>,
): ReadonlyMap<string, unknown> | undefined {
  const present = DRAWN_BY.filter((field) => field in body);
  if (present.length === 0) return undefined;
  const native = new Map(changes);
  for (const field of present) native.delete(field);
  const { min_tokens: least } = body;
  // Of one token: whether it may be a stop token at all.
  if (typeof least === 'number') native.set('min_tokens', Math.min(least, 1));
  return native;
}

/**
 * The prompt as whoever compares beginnings needs it: not what the model sees, but equal where that is equal, and longer where that is
 * longer. As it came, since a client writes what it has written before as it did then.
 */
function promptText(body: Buffer, fields: readonly JsonField[]): Uint8Array {
  const named = (name: string) => fields.findLast((field) => field.name === name);
  const prompt = named('prompt');
  if (prompt && body[prompt.valueFrom] === QUOTE) return body.subarray(prompt.valueFrom + 1, prompt.to - 1);
  const parts = [named('tools'), named('instructions'), named('messages') ?? named('input')];
  return Buffer.concat(parts.flatMap((part) => (part ? body.subarray(part.valueFrom, part.to) : [])));
}

const QUOTE = 0x22;

/** As workers find it, by what the prompt stands in; undefined where they take one, or refuse it. */
function outputTokensOf(json: JsonObject): number | undefined {
  const { max_tokens: most, max_completion_tokens: ofChat, max_output_tokens: ofResponse } = json;
  const tokens = 'messages' in json ? (ofChat ?? most) : 'input' in json ? ofResponse : most;
  return Number.isSafeInteger(tokens) && (tokens as number) > 1 ? (tokens as number) : undefined;
}

function bytesOfIds(ids: readonly number[]): Uint8Array {
  return new Uint8Array(Int32Array.from(ids).buffer);
}

function keysOfIds(ids: ArrayLike<number>, blockSize: number): BlockKey[] {
  const hashes: BlockHash[] = [];
  extendHashes(hashes, Int32Array.from(ids), blockSize);
  return hashes.map(keyOf);
}

/** By its first: an id that is none makes a wrong hint, and an error at the worker. */
function isTokenIds(prompt: unknown): prompt is number[] {
  return Array.isArray(prompt) && typeof prompt[0] === 'number';
}

function countPrompts(prompt: unknown): number {
  const many = Array.isArray(prompt) && !isTokenIds(prompt);
  return many ? Math.max(1, prompt.length) : 1;
}
