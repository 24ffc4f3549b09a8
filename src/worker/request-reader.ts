/**
 * Who reads bodies (server/reading.ts): the HTTP thread itself where they are short, a thread of its own where they are long, so that
 * no client's body holds up another client's stream.
 *
 *   read --(short)--> here, at once
 *        --(long)---> queue, the shorter first --(thread free)--> thread --> answer
 *                       | WAIT_MS                                   | WORK_MS, out of memory, died
 *                       v                                           v
 *                     READER_BUSY                                 BODY_TOO_COSTLY, INTERNAL; a new thread
 */
import { Worker } from 'node:worker_threads';
import { type ErrorData, PdError, unreachable } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import { threadEntry } from '../thread-entry.ts';
import { loadTextModel } from './server/model-text.ts';
import { type Readings, type Route, readBody, type Served } from './server/reading.ts';
import type { TextModel } from './server/text.ts';

/** `workerData` of the reader thread. */
export interface ReaderInit {
  readonly modelDir: string;
}

/** One at a time: the next goes when the last is answered. */
export interface ToReader {
  readonly served: Served;
  readonly route: Route;
  readonly body: Uint8Array<ArrayBuffer>;
}

export type FromReader =
  | { readonly type: 'ready' }
  /** The tokenizer cannot be loaded; the thread ends. */
  | { readonly type: 'failed'; readonly error: ErrorData }
  | { readonly type: 'read'; readonly reading: Readings[Route] }
  /** What the client is told: the body is wrong. */
  | { readonly type: 'refused'; readonly error: ErrorData };

/** What a reader thread is to its owner: tests put a scripted one here. */
export interface ReaderPort {
  post(message: ToReader): void;
  onMessage(listener: (message: FromReader) => void): void;
  /** The thread is over: asked for or not. */
  onExit(listener: (error: Error | undefined) => void): void;
  terminate(): Promise<void>;
}

/** What the server needs of it. */
export interface BodyReader {
  /**
   * Throws what the body is refused for, READER_BUSY where the reader did not come to it in time, BODY_TOO_COSTLY where it took too
   * much, REQUEST_ABORTED where `signal` fired while it waited.
   */
  read<R extends Route>(
    served: Served,
    route: R,
    body: Uint8Array<ArrayBuffer>,
    signal?: AbortSignal,
  ): Promise<Readings[R]>;
}

/**
 * Bytes of a body that is read at once. Measured with the demo model's tokenizer on a 2-core VM: 4 KiB take 3 ms at most (a thousand
 * prompts of one letter; one long word 2 ms, plain text 1.3 ms), some 10 ms while the code is not hot yet. The way to the thread and
 * back takes 0.03 ms when both are awake, more when the thread sleeps or is busy: prompts of a few hundred words pay none of it.
 */
const SHORT_BODY = 4_096;

/** From a thread's start to a loaded tokenizer. */
const START_MS = 60_000;
/** For the reader to come to a body. */
const WAIT_MS = 30_000;
/** For one body. The slowest seen that are no accident: 8 million ids to /detokenize, 4 s. */
const WORK_MS = 10_000;
/** A thread that computes ends within a turn. */
const TERMINATE_MS = 2_000;

export interface RequestReaderOptions {
  readonly startTimeoutMs?: number;
  readonly waitTimeoutMs?: number;
  readonly workTimeoutMs?: number;
  /** Bytes up to which a body is read without the thread. */
  readonly shortBody?: number;
  readonly openThread?: (init: ReaderInit) => ReaderPort;
}

interface Job {
  readonly message: ToReader;
  /** Of the body, which leaves with the message. */
  readonly bytes: number;
  readonly settle: (outcome: Readings[Route] | PdError) => void;
}

/** One thread's life. */
interface ReaderThread {
  readonly port: ReaderPort;
  ready: boolean;
  job: Job | undefined;
  /** Of its start, or of the job under way. */
  timer: NodeJS.Timeout | undefined;
}

export class RequestReader implements BodyReader {
  /** The HTTP thread's own copy of the tokenizer. */
  readonly model: TextModel;
  readonly #init: ReaderInit;
  readonly #log: Logger;
  readonly #options: Required<RequestReaderOptions>;
  /** The shorter first: many short ones then wait for one long one at most. */
  readonly #queue: Job[] = [];
  #thread: ReaderThread | undefined;
  #closing: Promise<void> | undefined;

  private constructor(model: TextModel, init: ReaderInit, log: Logger, options: RequestReaderOptions) {
    this.model = model;
    this.#init = init;
    this.#log = log;
    this.#options = {
      startTimeoutMs: START_MS,
      waitTimeoutMs: WAIT_MS,
      workTimeoutMs: WORK_MS,
      shortBody: SHORT_BODY,
      openThread,
      ...options,
    };
  }

  /** Loads the tokenizer here and starts the thread, which loads its own meanwhile. Throws CHECKPOINT_INVALID or MODEL_UNSUPPORTED. */
  static async start(
    modelDir: string,
    log: Logger,
    options: RequestReaderOptions = {},
  ): Promise<RequestReader> {
    const reader = new RequestReader(await loadTextModel(modelDir), { modelDir }, log, options);
    reader.#open();
    return reader;
  }

  async read<R extends Route>(
    served: Served,
    route: R,
    body: Uint8Array<ArrayBuffer>,
    signal?: AbortSignal,
  ): Promise<Readings[R]> {
    if (body.byteLength <= this.#options.shortBody) return readBody(served, this.model, route, body);
    return (await this.#readOnThread({ served, route, body }, signal)) as Readings[R];
  }

  /** Ends the thread; what waits or is being read fails with SERVER_DRAINING. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    const stopped = new PdError('SERVER_DRAINING', 'the worker stopped before the request was read');
    this.#failQueue(stopped);
    const thread = this.#thread;
    if (thread) await this.#end(thread, stopped);
  }

  #readOnThread(message: ToReader, signal: AbortSignal | undefined): Promise<Readings[Route]> {
    if (this.#closing) throw new PdError('SERVER_DRAINING', 'this worker is stopping');
    const { waitTimeoutMs } = this.#options;
    return new Promise((resolve, reject) => {
      const leave = (error: PdError) => {
        const at = this.#queue.indexOf(job);
        if (at < 0) return; // its turn has come
        this.#queue.splice(at, 1);
        job.settle(error);
      };
      const onAbort = () =>
        leave(new PdError('REQUEST_ABORTED', 'the client went away before its request was read'));
      const timer = setTimeout(() => {
        const seconds = waitTimeoutMs / 1_000;
        leave(new PdError('READER_BUSY', `other long requests were being read for ${seconds} s: gave up`));
      }, waitTimeoutMs);
      const bytes = message.body.byteLength;
      const job: Job = {
        message,
        bytes,
        settle: (outcome) => {
          clearTimeout(timer);
          signal?.removeEventListener('abort', onAbort);
          if (outcome instanceof PdError) reject(outcome);
          else resolve(outcome);
        },
      };
      const at = this.#queue.findIndex((other) => other.bytes > bytes);
      this.#queue.splice(at < 0 ? this.#queue.length : at, 0, job);
      if (signal?.aborted) onAbort();
      else signal?.addEventListener('abort', onAbort, { once: true });
      if (this.#thread) this.#next(this.#thread);
      else this.#open();
    });
  }

  #open(): void {
    const { startTimeoutMs } = this.#options;
    const port = this.#options.openThread(this.#init);
    const thread: ReaderThread = { port, ready: false, job: undefined, timer: undefined };
    this.#thread = thread;
    thread.timer = setTimeout(() => {
      const seconds = startTimeoutMs / 1_000;
      this.#lose(thread, new PdError('INTERNAL', `the reader thread was not ready after ${seconds} s`));
    }, startTimeoutMs);
    port.onMessage((message) => this.#receive(thread, message));
    port.onExit((error) => this.#lose(thread, deathOf(thread, error)));
  }

  #receive(thread: ReaderThread, message: FromReader): void {
    if (thread !== this.#thread) return; // given up a moment ago
    switch (message.type) {
      case 'ready':
        thread.ready = true;
        this.#next(thread);
        return;
      case 'failed':
        this.#lose(thread, PdError.fromData(message.error));
        return;
      case 'read':
        this.#answer(thread, message.reading);
        return;
      case 'refused':
        this.#answer(thread, PdError.fromData(message.error));
        return;
      default:
        unreachable(message, 'message from the reader thread');
    }
  }

  #answer(thread: ReaderThread, outcome: Readings[Route] | PdError): void {
    const { job } = thread;
    thread.job = undefined;
    this.#next(thread);
    job?.settle(outcome);
  }

  /** Gives the thread its next body, where it is free. */
  #next(thread: ReaderThread): void {
    if (!thread.ready || thread.job) return;
    clearTimeout(thread.timer);
    const job = this.#queue.shift();
    if (!job) return;
    thread.job = job;
    const { workTimeoutMs } = this.#options;
    thread.timer = setTimeout(() => {
      const what = `reading a body of ${job.bytes} bytes took more than ${workTimeoutMs / 1_000} s`;
      this.#lose(thread, new PdError('BODY_TOO_COSTLY', what));
    }, workTimeoutMs);
    thread.port.post(job.message);
  }

  /** The thread is of no use any more. Whose body it was reading hears `error`; for the others there is a new one. */
  #lose(thread: ReaderThread, error: PdError): void {
    if (thread !== this.#thread) return;
    const { ready } = thread;
    void this.#end(thread, error);
    if (this.#closing) return;
    if (ready) {
      this.#log.warn({ code: error.code }, `${error.message}: a new reader thread takes over`);
      this.#open();
      return;
    }
    // What did not start will not start at once.
    this.#log.error({ code: error.code }, `no reader thread until the next long request: ${error.message}`);
    this.#failQueue(error);
  }

  async #end(thread: ReaderThread, error: PdError): Promise<void> {
    this.#thread = undefined;
    clearTimeout(thread.timer);
    thread.job?.settle(error);
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<void>((resolve) => {
      timer = setTimeout(resolve, TERMINATE_MS);
    });
    await Promise.race([thread.port.terminate(), late]);
    clearTimeout(timer);
  }

  #failQueue(error: PdError): void {
    for (const job of this.#queue.splice(0)) job.settle(error);
  }
}

function deathOf({ job }: ReaderThread, error: Error | undefined): PdError {
  if (job && (error as NodeJS.ErrnoException | undefined)?.code === 'ERR_WORKER_OUT_OF_MEMORY') {
    const what = `reading a body of ${job.bytes} bytes took more than ${HEAP_MB} MB of memory`;
    return new PdError('BODY_TOO_COSTLY', what);
  }
  return new PdError(
    'INTERNAL',
    `the reader thread ended unasked: ${error?.message ?? 'no error'}`,
    {},
    { cause: error },
  );
}

/** Of a reader thread. A word of 4 million letters takes 1 GB; the tokenizer of Llama 3 itself some hundred MB. */
const HEAP_MB = 2_048;

function openThread(init: ReaderInit): ReaderPort {
  const worker = new Worker(threadEntry(import.meta.url, './reader-thread.js'), {
    workerData: init,
    name: 'reader',
    resourceLimits: { maxOldGenerationSizeMb: HEAP_MB },
  });
  let thrown: Error | undefined;
  worker.on('error', (error) => {
    thrown = error instanceof Error ? error : new Error(String(error));
  });
  return {
    post(message) {
      const { buffer, byteLength } = message.body;
      // Small buffers share Node's pool, which others are still writing to.
      const own = byteLength === buffer.byteLength ? message.body : message.body.slice();
      worker.postMessage({ ...message, body: own }, [own.buffer]);
    },
    onMessage: (listener) => worker.on('message', listener),
    onExit: (listener) => worker.on('exit', () => listener(thrown)),
    terminate: async () => {
      await worker.terminate();
    },
  };
}
