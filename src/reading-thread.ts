/**
 * A thread that reads request bodies, so that no client's body holds up another client's stream: the owner's side and the thread's.
 *
 *   read --> queue, the shorter first --(thread free)--> thread --> answer
 *              | WAIT_MS, WAITING_BYTES                    | WORK_MS, out of memory, died
 *              v                                           v
 *            READER_BUSY                                 BODY_TOO_COSTLY, INTERNAL; a new thread
 *
 * What is read, and which bodies are worth sending to the thread, is up to the owner (worker/request-body-reader.ts, proxy/body.ts).
 */
import { parentPort } from 'node:worker_threads';
import { type Deferred, deferred, type Signal, withDeadline } from './deferred.ts';
import { type ErrorData, PdError, unreachable } from './errors.ts';
import type { Logger } from './observability/log.ts';
import { startThread, type ThreadPort } from './thread-entry.ts';

/** What the thread receives, one at a time: the next is sent once the last is answered. */
export interface ReadingJob {
  /** Its memory moves to the thread. */
  readonly body: Uint8Array<ArrayBuffer>;
}

export type FromReader<Reading> =
  | { readonly type: 'ready' }
  /** Something it needs cannot be loaded; the thread ends. */
  | { readonly type: 'failed'; readonly error: ErrorData }
  | { readonly type: 'read'; readonly reading: Reading }
  /** The body is wrong; this is what the client gets. */
  | { readonly type: 'refused'; readonly error: ErrorData };

/** The thread as its owner sees it. */
export type ReaderPort<Job extends ReadingJob, Reading> = ThreadPort<Job, FromReader<Reading>>;

/** Of all waiting bodies: sixteen of the largest at a worker, eight at a proxy. Clients send faster than a tokenizer reads. */
const WAITING_BYTES = 256 * 2 ** 20;
/** From a thread's start until it is ready. */
const START_MS = 60_000;
/** Until the thread gets to a body. */
const WAIT_MS = 30_000;
/** For one body. The slowest legitimate one seen: 8 million ids to /detokenize, 4 s. */
const WORK_MS = 10_000;
/** Terminating a thread takes this long at most, even while it computes. */
const TERMINATE_MS = 2_000;
/** Of a thread. A word of 4 million letters takes 1 GB; the tokenizer of Llama 3 alone a few hundred MB. */
const HEAP_MB = 2_048;

export interface ReadingLimits {
  /** Of all waiting bodies. */
  readonly maxWaitingBytes?: number;
  readonly startTimeoutMs?: number;
  readonly waitTimeoutMs?: number;
  readonly workTimeoutMs?: number;
}

export interface ReadingThreadOptions<Job extends ReadingJob, Reading> extends ReadingLimits {
  /** Named in the error for those whose bodies are no longer read because it is stopping. */
  readonly owner: 'worker' | 'proxy';
  readonly log: Logger;
  readonly open: () => ReaderPort<Job, Reading>;
}

interface Waiting<Job, Reading> extends Deferred<Reading> {
  readonly job: Job;
  /** Of the body, whose memory leaves with the job. */
  readonly bytes: number;
}

/** One thread's life. */
interface Life<Job extends ReadingJob, Reading> {
  readonly port: ReaderPort<Job, Reading>;
  ready: boolean;
  reading: Waiting<Job, Reading> | undefined;
  /** Of its start, or of the body that is being read. */
  timer: NodeJS.Timeout | undefined;
}

/** Owns the thread, which is started by `start` or the first `read`, and replaced if lost. Must be closed. */
export class ReadingThread<Job extends ReadingJob, Reading> {
  readonly #options: Required<ReadingThreadOptions<Job, Reading>>;
  /** Shorter ones first: then many short ones wait for one long one at most. */
  readonly #queue: Waiting<Job, Reading>[] = [];
  #thread: Life<Job, Reading> | undefined;
  #closing: Promise<void> | undefined;

  constructor(options: ReadingThreadOptions<Job, Reading>) {
    this.#options = {
      maxWaitingBytes: WAITING_BYTES,
      startTimeoutMs: START_MS,
      waitTimeoutMs: WAIT_MS,
      workTimeoutMs: WORK_MS,
      ...options,
    };
  }

  /** Starts the thread before there is anything to read. */
  start(): void {
    if (!this.#thread && !this.#closing) this.#open();
  }

  /** Bytes of bodies that are being read or wait; Infinity while there is no thread that reads. */
  get bytesAhead(): number {
    if (!this.#thread?.ready) return Number.POSITIVE_INFINITY;
    return this.#queue.reduce((sum, { bytes }) => sum + bytes, this.#thread.reading?.bytes ?? 0);
  }

  /**
   * Throws the error that the body is refused with, READER_BUSY if the thread did not get to it in time or the queue was full,
   * BODY_TOO_COSTLY if it took too much time or memory, REQUEST_ABORTED if `signal` fired while it waited, SERVER_DRAINING once closed.
   */
  async read(job: Job, signal?: Signal): Promise<Reading> {
    const { waitTimeoutMs, owner } = this.#options;
    if (this.#closing) throw new PdError('SERVER_DRAINING', `this ${owner} is stopping`);
    const bytes = job.body.byteLength;
    const waiting: Waiting<Job, Reading> = { job, bytes, ...deferred<Reading>() };
    const leave = (error: PdError) => {
      const at = this.#queue.indexOf(waiting);
      if (at < 0) return; // its turn has come
      this.#queue.splice(at, 1);
      waiting.reject(error);
    };
    const onAbort = () =>
      leave(new PdError('REQUEST_ABORTED', 'the client disconnected before its request was read'));
    const timer = setTimeout(() => {
      const seconds = waitTimeoutMs / 1_000;
      leave(new PdError('READER_BUSY', `the reader was busy with other long requests for ${seconds} s`));
    }, waitTimeoutMs);
    try {
      const at = this.#queue.findIndex((other) => other.bytes > bytes);
      this.#queue.splice(at < 0 ? this.#queue.length : at, 0, waiting);
      if (signal?.aborted) onAbort();
      else signal?.addEventListener('abort', onAbort, { once: true });
      if (this.#thread) this.#next(this.#thread);
      else this.#open();
      this.#makeRoom();
      return await waiting.promise;
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener('abort', onAbort);
    }
  }

  /** Refuses the longest: it would wait longest, and it alone makes room for many. */
  #makeRoom(): void {
    const { maxWaitingBytes } = this.#options;
    let total = this.#queue.reduce((sum, { bytes }) => sum + bytes, 0);
    while (total > maxWaitingBytes) {
      const longest = this.#queue.pop()!;
      total -= longest.bytes;
      const what = `no room for a body of ${longest.bytes} bytes: at most ${maxWaitingBytes} bytes of bodies may wait for the reader`;
      longest.reject(new PdError('READER_BUSY', what));
    }
  }

  /** Ends the thread; bodies that wait or are being read fail with SERVER_DRAINING. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    const { owner } = this.#options;
    const stopped = new PdError('SERVER_DRAINING', `the ${owner} stopped before the request was read`);
    this.#failQueue(stopped);
    const thread = this.#thread;
    if (thread) await this.#end(thread, stopped);
  }

  #open(): void {
    const { startTimeoutMs, open } = this.#options;
    const port = open();
    const thread: Life<Job, Reading> = { port, ready: false, reading: undefined, timer: undefined };
    this.#thread = thread;
    thread.timer = setTimeout(() => {
      const seconds = startTimeoutMs / 1_000;
      this.#lose(thread, new PdError('INTERNAL', `the reader thread was not ready after ${seconds} s`));
    }, startTimeoutMs);
    port.onMessage((message) => this.#receive(thread, message));
    port.onExit((error) => this.#lose(thread, deathOf(thread.reading?.bytes, error)));
  }

  #receive(thread: Life<Job, Reading>, message: FromReader<Reading>): void {
    if (thread !== this.#thread) return; // already replaced
    switch (message.type) {
      case 'ready':
        thread.ready = true;
        this.#next(thread);
        return;
      case 'failed':
        this.#lose(thread, PdError.fromData(message.error));
        return;
      case 'read':
        this.#answered(thread)?.resolve(message.reading);
        return;
      case 'refused':
        this.#answered(thread)?.reject(PdError.fromData(message.error));
        return;
      default:
        unreachable(message, 'message from the reader thread');
    }
  }

  /** Whose answer the thread has just sent; it goes on with the next. */
  #answered(thread: Life<Job, Reading>): Waiting<Job, Reading> | undefined {
    const { reading } = thread;
    thread.reading = undefined;
    this.#next(thread);
    return reading;
  }

  /** Sends the thread its next body, if it is free. */
  #next(thread: Life<Job, Reading>): void {
    if (!thread.ready || thread.reading) return;
    clearTimeout(thread.timer);
    const waiting = this.#queue.shift();
    if (!waiting) return;
    thread.reading = waiting;
    const { workTimeoutMs } = this.#options;
    thread.timer = setTimeout(() => {
      const what = `reading a body of ${waiting.bytes} bytes took more than ${workTimeoutMs / 1_000} s`;
      this.#lose(thread, new PdError('BODY_TOO_COSTLY', what));
    }, workTimeoutMs);
    const { job } = waiting;
    const body = job.body.byteLength === job.body.buffer.byteLength ? job.body : copyOf(job.body);
    thread.port.post({ ...job, body }, [body.buffer]);
  }

  /** The thread is lost. The body it was reading fails with `error`; the others get a new thread. */
  #lose(thread: Life<Job, Reading>, error: PdError): void {
    if (thread !== this.#thread) return;
    const { log } = this.#options;
    const { ready } = thread;
    void this.#end(thread, error);
    if (this.#closing) return;
    if (ready) {
      log.warn({ code: error.code }, `${error.message}: a new reader thread takes over`);
      this.#open();
      return;
    }
    // A thread that did not start would not start if tried again at once.
    log.error({ code: error.code }, `no reader thread until the next long request: ${error.message}`);
    this.#failQueue(error);
  }

  async #end(thread: Life<Job, Reading>, error: PdError): Promise<void> {
    this.#thread = undefined;
    clearTimeout(thread.timer);
    thread.reading?.reject(error);
    await withDeadline(thread.port.terminate(), TERMINATE_MS);
  }

  #failQueue(error: PdError): void {
    for (const waiting of this.#queue.splice(0)) waiting.reject(error);
  }
}

/**
 * In memory of its own, which may move to another thread. Bodies are Buffers, whose `slice` is no copy; small ones share Node's pool, which
 * must not move: Node 22 and later throw.
 */
export function copyOf(bytes: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  return new Uint8Array(bytes);
}

/** `bytes`: of the body that was being read. */
function deathOf(bytes: number | undefined, error: Error | undefined): PdError {
  const outOfMemory = (error as NodeJS.ErrnoException | undefined)?.code === 'ERR_WORKER_OUT_OF_MEMORY';
  if (bytes !== undefined && outOfMemory) {
    const what = `reading a body of ${bytes} bytes took more than ${HEAP_MB} MB of memory`;
    return new PdError('BODY_TOO_COSTLY', what);
  }
  return PdError.because('INTERNAL', 'the reader thread ended unexpectedly', error ?? 'no error');
}

/** Starts `entry`, which calls `answerReadings`. */
export function openReader<Job extends ReadingJob, Reading>(
  entry: URL,
  workerData?: unknown,
): ReaderPort<Job, Reading> {
  const resourceLimits = { maxOldGenerationSizeMb: HEAP_MB };
  return startThread(entry, { workerData, name: 'reader', resourceLimits });
}

/**
 * The thread's side: loads what it needs, then answers one body after another until its owner ends it. `buffersOf` names the memory of
 * a reading that moves to the owner instead of being copied.
 */
export async function answerReadings<Job extends ReadingJob, Reading>(
  load: () => ((job: Job) => Reading) | Promise<(job: Job) => Reading>,
  buffersOf: (reading: Reading) => readonly ArrayBuffer[],
): Promise<void> {
  if (!parentPort) throw new PdError('INTERNAL', 'the reader thread was started as a program');
  const port = parentPort;
  const post = (message: FromReader<Reading>, transfer: readonly ArrayBuffer[] = []) =>
    port.postMessage(message, transfer);
  try {
    const read = await load();
    port.on('message', (job: Job) => {
      try {
        const reading = read(job);
        post({ type: 'read', reading }, buffersOf(reading));
      } catch (error) {
        post({ type: 'refused', error: PdError.from(error).toData() });
      }
    });
    post({ type: 'ready' });
  } catch (error) {
    post({ type: 'failed', error: PdError.from(error).toData() });
  }
}
