/**
 * From the bytes of a body to what is to be done: JSON, schema, template, tokens, checks. `readRequestBody` does no I/O and never waits, so
 * the same function runs on the HTTP thread for short bodies and on the reader thread (reading-thread.ts) for long ones; what it returns is plain
 * data.
 */
import { PdError } from '../errors.ts';
import { type TextModel, Tokenizer } from '../model/tokenizer.ts';
import type { Logger } from '../observability/log.ts';
import {
  openReader,
  type ReaderPort as ReaderPortOf,
  type ReadingLimits,
  ReadingThread,
} from '../reading-thread.ts';
import { threadEntry } from '../thread-entry.ts';
import type { GrammarCompiler } from './grammar-compiler.ts';
import { type ChatReading, readChat } from './server/chat.ts';
import { type CompletionReading, readCompletion } from './server/completions.ts';
import { parseJson, type Served } from './server/fields.ts';
import { type ResponseReading, readResponse } from './server/responses.ts';
import { readDetokenize, readTokenize } from './server/tokenize.ts';

/** What comes of a body, by route. The tokenizer's routes need nothing more: theirs is the answer itself, as JSON in UTF-8. */
export interface Readings {
  readonly completions: CompletionReading;
  readonly chat: ChatReading;
  readonly responses: ResponseReading;
  readonly tokenize: Uint8Array<ArrayBuffer>;
  readonly detokenize: Uint8Array<ArrayBuffer>;
}

export type Route = keyof Readings;

const READERS: {
  readonly [R in Route]: (served: Served, model: TextModel, body: unknown) => Readings[R];
} = {
  completions: readCompletion,
  chat: readChat,
  responses: readResponse,
  tokenize: readTokenize,
  detokenize: readDetokenize,
};

/** Throws REQUEST_INVALID, MODEL_NOT_FOUND or CONTEXT_EXCEEDED; BODY_TOO_COSTLY where it is nested deeper than the stack goes. */
export function readRequestBody<R extends Route>(
  served: Served,
  model: TextModel,
  route: R,
  body: Uint8Array,
): Readings[R] {
  try {
    return READERS[route](served, model, parseJson(body));
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    throw PdError.because('BODY_TOO_COSTLY', 'reading the body', cause);
  }
}

function wantsGrammar(reading: Readings[Route]): boolean {
  return !(reading instanceof Uint8Array) && reading.asked.grammarWish !== undefined;
}

/** The grammar that `reading` asks for, built: the reader thread's part. Throws REQUEST_INVALID. */
export function withGrammar(
  reading: Readings[Route],
  grammars: GrammarCompiler,
  { vocabSize }: Served,
): Readings[Route] {
  if (reading instanceof Uint8Array || !reading.asked.grammarWish) return reading;
  const { grammarWish, ...asked } = reading.asked;
  const grammar = grammars.compile(grammarWish, vocabSize);
  return {
    ...reading,
    asked: { ...asked, grammarParam: grammarWish.param, sampling: { ...asked.sampling, grammar } },
  };
}

/** `workerData` of the reader thread. */
export interface ReaderInit {
  readonly modelDir: string;
}

export interface ToReader {
  readonly served: Served;
  readonly route: Route;
  readonly body: Uint8Array<ArrayBuffer>;
}

export type ReaderPort = ReaderPortOf<ToReader, Readings[Route]>;

/**
 * Bytes of a body that is read at once. Measured with the demo model's tokenizer on a 2-core VM: 4 KiB take 3 ms at most (a thousand
 * prompts of one letter; one long word 2 ms, plain text 1.3 ms), some 10 ms while the code is not hot yet. The way to the thread and
 * back takes 0.03 ms when both are awake, more when the thread sleeps or is busy: prompts of a few hundred words pay none of it.
 */
const SHORT_BODY = 4_096;

/**
 * From the start of the worker to that of the thread, where no long body comes before. Loading what it needs takes as long as all else
 * that a start on the host takes, and must not take the cores from that.
 */
const THREAD_AFTER_MS = 10_000;

export interface RequestBodyReaderOptions extends ReadingLimits {
  /** Bytes up to which a body is read without the thread. */
  readonly shortBody?: number;
  /** Milliseconds until the thread starts where nobody needs it before; 0: at once. */
  readonly threadAfterMs?: number;
  readonly openThread?: (init: ReaderInit) => ReaderPort;
}

export class RequestBodyReader {
  /** The HTTP thread's own copy of the tokenizer. */
  readonly model: TextModel;
  readonly #thread: ReadingThread<ToReader, Readings[Route]>;
  readonly #shortBody: number;
  #timer: NodeJS.Timeout | undefined;

  private constructor(
    model: TextModel,
    init: ReaderInit,
    log: Logger,
    { shortBody = SHORT_BODY, openThread: open = openThread, ...limits }: RequestBodyReaderOptions,
  ) {
    this.model = model;
    this.#shortBody = shortBody;
    this.#thread = new ReadingThread({ ...limits, owner: 'worker', log, open: () => open(init) });
  }

  /** Loads the tokenizer here; the thread starts later, and loads its own. Throws CHECKPOINT_INVALID or MODEL_UNSUPPORTED. */
  static async start(
    modelDir: string,
    log: Logger,
    options: RequestBodyReaderOptions = {},
  ): Promise<RequestBodyReader> {
    const reader = new RequestBodyReader(await Tokenizer.load(modelDir), { modelDir }, log, options);
    const { threadAfterMs = THREAD_AFTER_MS } = options;
    if (threadAfterMs === 0) reader.#thread.start();
    else reader.#timer = setTimeout(() => reader.#thread.start(), threadAfterMs).unref();
    return reader;
  }

  /** Throws what `readRequestBody` and `ReadingThread.read` throw. */
  async read<R extends Route>(
    served: Served,
    route: R,
    body: Uint8Array<ArrayBuffer>,
    signal?: AbortSignal,
  ): Promise<Readings[R]> {
    if (body.byteLength <= this.#shortBody) {
      const reading = readRequestBody(served, this.model, route, body);
      // However short it is, building a grammar may take long.
      if (!wantsGrammar(reading)) return reading;
    }
    return (await this.#thread.read({ served, route, body }, signal)) as Readings[R];
  }

  /** Ends the thread; what waits or is being read fails with SERVER_DRAINING. Idempotent. */
  close(): Promise<void> {
    clearTimeout(this.#timer);
    return this.#thread.close();
  }
}

function openThread(init: ReaderInit): ReaderPort {
  return openReader(threadEntry(import.meta.url, './request-body-thread.js'), init);
}
