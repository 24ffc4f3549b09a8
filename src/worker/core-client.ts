/** The main thread's side of the core thread: sends requests, delivers outputs to whoever asked, and is the first to learn of the core's death. */
import { type Deferred, deferred, withDeadline } from '../deferred.ts';
import { type ErrorData, PdError, unreachable } from '../errors.ts';
import type { Timeline } from '../observability/timelines.ts';
import type { CacheChange, CoreRequest, RequestOutput } from '../scheduler/types.ts';
import { startThread, type ThreadPort, threadEntry } from '../thread-entry.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';
import { AsyncQueue } from './async-queue.ts';
import type { CoreInfo, CoreInit, CoreStage, CoreState, FromCore, ToCore } from './core-messages.ts';

/** The core thread as its client sees it. */
export type CorePort = ThreadPort<ToCore, FromCore>;

/** The outputs of one request, in order; throws where the request failed or was aborted by its signal. Leaving the loop aborts it. */
export interface Generation extends AsyncIterable<RequestOutput> {
  /** Gives up one of the n completions, for instance at a stop string: no more outputs of it come. */
  abort(index: number): void;
  /**
   * On a producer, once the outputs have ended: resolves when KV of the request is under way to its consumer (undefined; at once where
   * none is sent), or with why it will not come. Never rejects.
   */
  kvSaved(): Promise<ErrorData | undefined>;
}

interface Pending {
  readonly queue: AsyncQueue<RequestOutput>;
  readonly open: Set<number>;
  readonly unlisten: () => void;
  /** Once the output has come that tells of its KV. */
  saved: Deferred<ErrorData | undefined> | undefined;
}

export interface CoreClientOptions {
  /** From thread start to a loaded model. */
  readonly startTimeoutMs?: number;
  /** From `shutdown` to the end of the thread, before it is ended by force. */
  readonly shutdownTimeoutMs?: number;
}

type Question =
  | Omit<Extract<ToCore, { readonly type: 'state' }>, 'seq'>
  | Omit<Extract<ToCore, { readonly type: 'timelines' }>, 'seq'>;

interface Answers {
  readonly state: CoreState;
  readonly timelines: readonly Timeline<CoreStage>[];
}

/** For a core that has failed to take itself apart. */
const FAILED_END_MS = 2_000;

/** A thread inside a native call that never returns cannot be ended; whoever ends the process knows how to (cli/worker.ts). */
const TERMINATE_MS = 2_000;

export class CoreClient {
  readonly #ended = deferred<PdError | undefined>();
  /** Resolves when the core has ended: with the error where it was not asked to. Never rejects. */
  readonly ended = this.#ended.promise;
  readonly #port: CorePort;
  readonly #shutdownTimeoutMs: number;
  readonly #pending = new Map<EngineRequestId, Pending>();
  /** Requests whose KV the core will still tell of. */
  readonly #saves = new Map<EngineRequestId, Deferred<ErrorData | undefined>>();
  /** Questions under way. */
  readonly #answers = new Map<number, Deferred<unknown>>();
  #onCache: ((changes: readonly CacheChange[]) => void) | undefined;
  #info: CoreInfo | undefined;
  readonly #ready = deferred<CoreInfo>();
  /** Resolves once the core has closed what it held, or its thread is over. */
  readonly #gone = deferred<void>();
  #asked = 0;
  /** Set once the core accepts nothing any more. */
  #over: PdError | undefined;
  #closing: Promise<void> | undefined;

  private constructor(port: CorePort, shutdownTimeoutMs: number) {
    this.#port = port;
    this.#shutdownTimeoutMs = shutdownTimeoutMs;
    port.onMessage((message) => this.#receive(message));
    port.onExit((error) => this.#exited(error));
  }

  /** Starts the core thread and waits until its model is loaded. */
  static start(init: CoreInit, options: CoreClientOptions = {}): Promise<CoreClient> {
    const entry = threadEntry(import.meta.url, './core-thread.js');
    return CoreClient.connect(startThread(entry, { workerData: init, name: 'core' }), options);
  }

  /** Waits for `ready` on a port. Throws what the core died of, or INTERNAL at the deadline; the thread is over then. */
  static async connect(port: CorePort, options: CoreClientOptions = {}): Promise<CoreClient> {
    const { startTimeoutMs = 600_000, shutdownTimeoutMs = 10_000 } = options;
    const client = new CoreClient(port, shutdownTimeoutMs);
    const first = await withDeadline(Promise.race([client.#ready.promise, client.ended]), startTimeoutMs);
    if (first !== undefined && !(first instanceof PdError)) {
      client.#info = first;
      return client;
    }
    await withDeadline(port.terminate(), TERMINATE_MS);
    const late = `the core thread was not ready after ${startTimeoutMs / 1_000} s`;
    throw first ?? new PdError('INTERNAL', late);
  }

  get info(): CoreInfo {
    if (this.#info === undefined) throw new PdError('INTERNAL', 'the core thread is not ready yet');
    return this.#info;
  }

  /** From now on `listener` hears of what enters and leaves the prefix cache, where the core tells. */
  onCacheChange(listener: (changes: readonly CacheChange[]) => void): void {
    this.#onCache = listener;
  }

  /** Requests whose last output has not come. */
  get pending(): number {
    return this.#pending.size;
  }

  /** Hands a request to the core at once. Throws ENGINE_CLOSED where there is no core, REQUEST_INVALID where the id is in use. */
  generate(request: CoreRequest, signal?: AbortSignal): Generation {
    const { requestId, n } = request;
    if (this.#over) throw this.#over;
    if (this.#pending.has(requestId)) {
      throw new PdError('REQUEST_INVALID', `a request with id ${requestId} is under way`, { requestId });
    }
    const queue = new AsyncQueue<RequestOutput>(() => this.#abort(requestId));
    const onAbort = () => {
      this.#abort(requestId);
      queue.fail(new PdError('REQUEST_ABORTED', `request ${requestId} was aborted`, { requestId }));
    };
    const pending: Pending = {
      queue,
      open: new Set(Array.from({ length: n }, (_, index) => index)),
      unlisten: () => signal?.removeEventListener('abort', onAbort),
      saved: undefined,
    };
    this.#pending.set(requestId, pending);
    this.#port.post({ type: 'add', request });
    if (signal?.aborted) onAbort();
    else signal?.addEventListener('abort', onAbort, { once: true });
    return {
      [Symbol.asyncIterator]: () => queue,
      abort: (index) => this.#abortIndex(requestId, index),
      kvSaved: async () => await pending.saved?.promise,
    };
  }

  /** What the core says of itself. Throws INTERNAL where it does not answer in time. */
  state(timeoutMs = 2_000): Promise<CoreState> {
    return this.#ask({ type: 'state', integrity: false }, timeoutMs);
  }

  /** The same after a look through every block, of which there may be millions. */
  inspect(timeoutMs = 30_000): Promise<CoreState> {
    return this.#ask({ type: 'state', integrity: true }, timeoutMs);
  }

  /** When these requests passed which stages in the core; without those that it does not know any more. Throws likewise. */
  timelines(transferIds: readonly TransferId[], timeoutMs = 2_000): Promise<readonly Timeline<CoreStage>[]> {
    return this.#ask({ type: 'timelines', transferIds }, timeoutMs);
  }

  async #ask<Q extends Question>(question: Q, timeoutMs: number): Promise<Answers[Q['type']]> {
    if (this.#over) throw this.#over;
    const seq = ++this.#asked;
    const answer = deferred<unknown>();
    this.#answers.set(seq, answer);
    this.#port.post({ ...question, seq });
    try {
      const told = await withDeadline(answer.promise, timeoutMs);
      if (told !== undefined) return told as Answers[Q['type']];
      const late = `the core thread did not answer a ${question.type} request within ${timeoutMs} ms`;
      throw new PdError('INTERNAL', late);
    } finally {
      this.#answers.delete(seq);
    }
  }

  /** Tells the core what needs no answer; does nothing once it is over. */
  tell(
    message: Extract<
      ToCore,
      { readonly type: 'release' | 'prefilled' | 'kv-failed' | 'serve' | 'drain' | 'abort' }
    >,
  ): void {
    if (!this.#over) this.#port.post(message);
  }

  /** Ends the thread, by force at the deadline; what is still pending fails. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    const failed = this.#over !== undefined;
    this.#fail(new PdError('SERVER_DRAINING', 'the worker stopped before the request was done'));
    this.#port.post({ type: 'shutdown' });
    await withDeadline(this.#gone.promise, failed ? FAILED_END_MS : this.#shutdownTimeoutMs);
    await withDeadline(this.#port.terminate(), TERMINATE_MS);
    this.#ended.resolve(undefined);
  }

  #receive(message: FromCore): void {
    switch (message.type) {
      case 'ready':
        this.#ready.resolve(message.info);
        return;
      case 'outputs':
        for (const output of message.outputs) this.#deliver(output);
        return;
      case 'kv-saved':
        this.#saves.get(message.requestId)?.resolve(message.error);
        this.#saves.delete(message.requestId);
        return;
      case 'state':
        this.#answers.get(message.seq)?.resolve(message.state);
        return;
      case 'timelines':
        this.#answers.get(message.seq)?.resolve(message.timelines);
        return;
      case 'cache':
        this.#onCache?.(message.changes);
        return;
      case 'fatal':
        this.#die(PdError.fromData(message.error));
        return;
      case 'closed':
        this.#exited(undefined);
        return;
      default:
        unreachable(message, 'message from the core thread');
    }
  }

  #deliver(output: RequestOutput): void {
    const pending = this.#pending.get(output.requestId);
    // Aborted a moment ago: the core could not know.
    if (!pending?.open.has(output.index)) return;
    const { kvSave } = output;
    if (kvSave) {
      pending.saved = deferred<ErrorData | undefined>();
      if (kvSave.state === 'failed') pending.saved.resolve(kvSave.error);
      else this.#saves.set(output.requestId, pending.saved);
    }
    pending.queue.push(output);
    if (output.finishReason === undefined && output.error === undefined) return;
    this.#closeIndex(output.requestId, pending, output.index);
  }

  #closeIndex(requestId: EngineRequestId, pending: Pending, index: number): void {
    pending.open.delete(index);
    if (pending.open.size > 0) return;
    this.#forget(requestId, pending);
    pending.queue.end();
  }

  #abortIndex(requestId: EngineRequestId, index: number): void {
    const pending = this.#pending.get(requestId);
    if (!pending?.open.has(index)) return;
    this.tell({ type: 'abort', requestId, index });
    this.#closeIndex(requestId, pending, index);
  }

  #abort(requestId: EngineRequestId): void {
    const pending = this.#pending.get(requestId);
    if (!pending) return;
    this.#forget(requestId, pending);
    this.#saves.delete(requestId);
    this.tell({ type: 'abort', requestId });
  }

  #forget(requestId: EngineRequestId, pending: Pending): void {
    this.#pending.delete(requestId);
    pending.unlisten();
  }

  #exited(error: Error | undefined): void {
    this.#gone.resolve();
    if (this.#closing) this.#ended.resolve(undefined);
    else this.#die(PdError.from(error ?? new Error('the core thread ended unasked')));
  }

  #die(error: PdError): void {
    this.#fail(error);
    this.#ended.resolve(this.#closing ? undefined : error);
  }

  #fail(error: PdError): void {
    this.#over ??= error;
    for (const [requestId, pending] of this.#pending) {
      this.#forget(requestId, pending);
      pending.queue.fail(error);
    }
    for (const saved of this.#saves.values()) saved.resolve(error.toData());
    for (const answer of this.#answers.values()) answer.reject(error);
  }
}
