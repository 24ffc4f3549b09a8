/**
 * Who reads clients' bodies (body.ts): the main thread, which relays all streams, where they are short; a thread of its own where long, and
 * where their prompts are to be tokenized. A prompt is tokenized only while the thread has little to do: then the request goes on without.
 */
import type { Signal } from '../deferred.ts';
import { PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import { openReader, type ReaderPort, type ReadingLimits, ReadingThread } from '../reading-thread.ts';
import { threadEntry } from '../thread-entry.ts';
import { NO_KEYS, type RequestBody, readBody, type WantedKeys } from './body.ts';

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
 * Bytes of a body that is read at once. Measured on a 2-core VM, medians: 64 KiB of text take 0.1 ms, of token ids 0.5 ms, of junk up to
 * 1.6 ms (some 10 ms where it is nested as deep as the stack goes), 256 KiB up to 22 ms. So prompts of some ten thousand tokens do not
 * pay the way to the thread.
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
    if (short) return readBody(body, wanted);
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
    const kept = body.byteLength <= this.#shortBody ? body.slice() : undefined;
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
