/** The transfer engine as its users hold it: starts the transfer thread, and turns calls into messages and messages into promises. */
import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import type { TransferOptionsInput } from '../config/embedded.ts';
import type { TransferOptions } from '../config/transfer-options.ts';
import { deferred, withDeadline } from '../deferred.ts';
import { createDevice } from '../device/create-device.ts';
import type { Device, MemoryRef } from '../device/device.ts';
import { hostView } from '../device/memory.ts';
import { prepareNativeEnvironment } from '../device/native-env.ts';
import { type ErrorData, PdError, unreachable } from '../errors.ts';
import type { HostPort } from '../net/address.ts';
import { threadEntry } from '../thread-entry.ts';
import type { TensorId, TransferId } from '../wire/ids.ts';
import type { WorkerLoad } from '../wire/messages.ts';
import { checkLoad, checkSend } from './check-request.ts';
import type { FromWire, NativeInit, ToWire } from './native/channel.ts';
import type { FromTransfer, ToTransfer, TransferInit } from './thread-messages.ts';
import type {
  LoadRequest,
  LoadResult,
  ProxyPing,
  SendRequest,
  StoredTensor,
  TransferState,
} from './types.ts';

/** For the thread to close its pairs and sockets; after it, it is ended by force. */
const CLOSE_TIMEOUT_MS = 5_000;

/** What waits for messages of the thread. */
type Pending =
  | {
      readonly kind: 'send';
      gathered(): void;
      underWay(): void;
      sent(bytes: number): void;
      reject(error: PdError): void;
    }
  | { readonly kind: 'question'; resolve(answer: unknown): void; reject(error: PdError): void };

/** What each question is answered with. */
interface Answers {
  readonly receive: StoredTensor;
  readonly load: LoadResult;
  readonly state: TransferState;
}

/** The moments of a send. None rejects unhandled: a caller may look at one and ignore the others. */
export interface SendHandle {
  /** The source may be overwritten. */
  readonly gathered: Promise<void>;
  /**
   * PUT, PUT_ASYNC: there is a pair with the peer, so that the peer knows by itself of whatever goes wrong from now on. GET: as `sent`.
   * Never later than `sent`.
   */
  readonly underWay: Promise<void>;
  /** PUT, PUT_ASYNC: the peer has it. GET: kept, to be asked for. Resolves with the bytes. */
  readonly sent: Promise<number>;
}

export interface TransferEngineExtras {
  /** `buffer` of the MetricsPage that the transfer thread writes. */
  readonly metrics?: SharedArrayBuffer;
  /**
   * For `HandOver`, which speaks through this engine.
   * @internal
   */
  readonly native?: NativeInit;
}

/** What a connector needs of an engine. */
export type TransferEngineApi = Omit<TransferEngine, 'native' | typeof Symbol.asyncDispose>;

/** Moves tensors and paged KV between peers, from any thread. Dispose it: its thread keeps the process alive. */
export class TransferEngine {
  /** The ROUTER's `host:port` as told to others. */
  readonly address: HostPort;
  /** `host` or `cuda:N`. */
  readonly #deviceName: string;
  readonly #worker: Worker;
  /** For views of pinned memory; host memory needs none. */
  readonly #device: Device | undefined;
  readonly #exited: Promise<true>;
  readonly #pending = new Map<number, Pending>();
  #seq = 0;
  #hearNative: (event: FromWire) => void = () => {};
  /** Messages that are being collected to cross as one. */
  #together: ToTransfer[] | undefined;
  #closed: PdError | undefined;
  #disposed: Promise<void> | undefined;

  private constructor(worker: Worker, address: HostPort, device: Device | undefined) {
    this.#deviceName = device?.name ?? 'host';
    this.#worker = worker;
    this.address = address;
    this.#device = device;
    this.#exited = new Promise((resolve) => worker.once('exit', () => resolve(true)));
    worker.on('message', (messages: readonly FromTransfer[]) => {
      for (const message of messages) this.#hear(message);
    });
    worker.on('error', (error) => this.#fail(`the transfer thread crashed: ${PdError.from(error).message}`));
    void this.#exited.then(() => this.#fail('the transfer thread has ended'));
  }

  /**
   * Binds the KV port and starts the thread; `transferOptions` says what fields left out become. Throws CONFIG_INVALID, PORT_IN_USE,
   * ADDRESS_INVALID, DEVICE_UNAVAILABLE and the like. On a GPU, create the first engine on the main thread: the environment that NCCL
   * reads can be set from there alone.
   */
  static async create(
    input: TransferOptionsInput = {},
    extras: TransferEngineExtras = {},
  ): Promise<TransferEngine> {
    const { transferOptions } = await import('../config/embedded.ts');
    return await TransferEngine.open(transferOptions(input), extras);
  }

  /** As `create`, from options that are complete and checked: a worker's are, and its core thread need not load what checks them. */
  static async open(options: TransferOptions, extras: TransferEngineExtras = {}): Promise<TransferEngine> {
    prepareNativeEnvironment(options);
    const device = options.device === 'host' ? undefined : await createDevice(options.device);
    const init: TransferInit = { options, ...extras };
    const worker = new Worker(threadEntry(import.meta.url, './thread.js'), {
      workerData: init,
      name: 'transfer',
    });
    try {
      return new TransferEngine(worker, await started(worker), device);
    } catch (error) {
      device?.dispose();
      throw PdError.from(error);
    }
  }

  /** Never throws: failures come by the handle's promises. Order per peer is kept. */
  send(request: SendRequest): SendHandle {
    const gathered = deferred<void>();
    const underWay = deferred<void>();
    const sent = deferred<number>();
    // A caller may look at one of them and leave the others.
    gathered.promise.catch(() => undefined);
    underWay.promise.catch(() => undefined);
    sent.promise.catch(() => undefined);
    const message = (seq: number): ToTransfer => {
      checkSend(request, this.#deviceName);
      return { type: 'send', seq, request };
    };
    this.#expect(message, {
      kind: 'send',
      gathered: () => gathered.resolve(),
      underWay: () => underWay.resolve(),
      sent: (bytes) => {
        underWay.resolve();
        gathered.resolve();
        sent.resolve(bytes);
      },
      reject: (error) => {
        underWay.reject(error);
        gathered.reject(error);
        sent.reject(error);
      },
    });
    return { gathered: gathered.promise, underWay: underWay.promise, sent: sent.promise };
  }

  /**
   * As `send` for each. In one message to the transfer thread, so that tensors of one request (its layers) are gathered and sent
   * together. Where the model computes layer by layer, `send` each as it is there instead.
   */
  sendAll(requests: readonly SendRequest[]): SendHandle[] {
    const together: ToTransfer[] = [];
    this.#together = together;
    const handles = requests.map((request) => this.send(request));
    this.#together = undefined;
    try {
      // What the requests share (block ids, shapes, layouts) is copied once.
      if (together.length > 0) this.#worker.postMessage(together);
    } catch (error) {
      const failed = PdError.from(error, 'REQUEST_INVALID');
      for (const message of together) if ('seq' in message) this.#take(message.seq)?.reject(failed);
    }
    return handles;
  }

  /** Waits for one tensor (PUT) or asks `peer` for it (GET). It belongs to the caller until `finish` names its request. */
  receive(tensorId: TensorId, peer: HostPort, timeoutMs?: number): Promise<StoredTensor> {
    return this.#ask<'receive'>((seq) => ({ type: 'receive', seq, tensorId, peer, timeoutMs }));
  }

  /** Takes the KV of one request into paged blocks. Rejects with KV_LOAD_TIMEOUT or KV_LOAD_FAILED (cause inside the message). */
  load(request: LoadRequest): Promise<LoadResult> {
    return this.#ask<'load'>((seq) => {
      checkLoad(request, this.#deviceName);
      return { type: 'load', seq, request };
    });
  }

  /** Gives up a load under way; its promise rejects with REQUEST_ABORTED once no write into the blocks can happen any more. */
  cancelLoad(requestId: string): void {
    this.#tell({ type: 'cancel-load', requestId });
  }

  /** The producer is done with the prompt: loads of it that were told `prefillWithinMs` have `timeouts.load` from now. */
  prefilled(id: TransferId): void {
    this.#tell({ type: 'prefilled', id });
  }

  /** The producer has told that it could not send this KV: a load of it, under way or to come, fails at once, with `reason` inside. */
  sendFailed(id: TransferId, reason: ErrorData): void {
    this.#tell({ type: 'send-failed', id, reason });
  }

  /** The request is over: frees what is held for it, and drops and frees what still comes. `keepSends`: its sends in GET stay to be asked for. */
  finish(id: TransferId, options: { readonly keepSends?: boolean } = {}): void {
    this.#tell({ type: 'finish', id, keepSends: options.keepSends ?? false });
  }

  /** Starts the pings to the proxies: only once the instance can serve. */
  startPing(ping: ProxyPing): void {
    this.#tell({ type: 'start-ping', ping });
  }

  stopPing(): void {
    this.#tell({ type: 'stop-ping' });
  }

  /** What pings say from now on; the next leaves at once. */
  reportLoad(load: WorkerLoad): void {
    this.#tell({ type: 'worker-load', load });
  }

  /**
   * Where the native hand-over speaks; `hear` is told what comes, and nothing after `dispose`.
   * @internal
   */
  native(hear: (event: FromWire) => void): (command: ToWire) => void {
    this.#hearNative = hear;
    return (command) => this.#tell({ type: 'native', command });
  }

  state(): Promise<TransferState> {
    return this.#ask<'state'>((seq) => ({ type: 'state', seq }));
  }

  /** A CPU view of host or pinned memory; see Device.view. */
  view(memory: MemoryRef): Uint8Array {
    return this.#device ? this.#device.view(memory) : hostView(memory);
  }

  /** Ends every pair and the thread. Idempotent, bounded in time. */
  dispose(): Promise<void> {
    this.#disposed ??= this.#close();
    return this.#disposed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  async #close(): Promise<void> {
    this.#tell({ type: 'shutdown' });
    this.#closed ??= new PdError('ENGINE_CLOSED', 'the transfer engine has been disposed');
    if (!(await withDeadline(this.#exited, CLOSE_TIMEOUT_MS))) await this.#worker.terminate();
    this.#fail('the transfer engine has been disposed');
    this.#device?.dispose();
  }

  #ask<Type extends keyof Answers>(
    question: (seq: number) => Extract<ToTransfer, { readonly type: Type }>,
  ): Promise<Answers[Type]> {
    const { promise, resolve, reject } = deferred<unknown>();
    this.#expect(question, { kind: 'question', resolve, reject });
    return promise as Promise<Answers[Type]>;
  }

  #expect(message: (seq: number) => ToTransfer, pending: Pending): void {
    if (this.#closed) {
      pending.reject(this.#closed);
      return;
    }
    const seq = this.#seq++;
    this.#pending.set(seq, pending);
    try {
      this.#post(message(seq));
    } catch (error) {
      // What is wrong with it, or cannot be cloned, is the caller's mistake, and its alone.
      this.#pending.delete(seq);
      pending.reject(PdError.from(error, 'REQUEST_INVALID'));
    }
  }

  #tell(message: ToTransfer): void {
    if (!this.#closed) this.#post(message);
  }

  /** At once, since the caller may be about to compute: what it has said is done meanwhile. */
  #post(message: ToTransfer): void {
    if (this.#together) this.#together.push(message);
    else this.#worker.postMessage([message]);
  }

  /** The thread is gone: everything that waits for it fails. */
  #fail(why: string): void {
    this.#closed ??= new PdError('ENGINE_CLOSED', why);
    const pending = [...this.#pending.values()];
    this.#pending.clear();
    for (const one of pending) one.reject(this.#closed);
  }

  #hear(message: FromTransfer): void {
    switch (message.type) {
      case 'ready':
      case 'not-ready':
      case 'closed':
        return;
      case 'gathered': {
        const pending = this.#pending.get(message.seq);
        if (pending?.kind !== 'send') return;
        // In this order, so that who waits for the second knows of the first.
        if (message.underWay) pending.underWay();
        pending.gathered();
        return;
      }
      case 'under-way': {
        const pending = this.#pending.get(message.seq);
        if (pending?.kind === 'send') pending.underWay();
        return;
      }
      case 'failed':
        this.#take(message.seq)?.reject(PdError.fromData(message.error));
        return;
      case 'sent': {
        const pending = this.#take(message.seq);
        if (pending?.kind === 'send') pending.sent(message.bytes);
        return;
      }
      case 'answer': {
        const pending = this.#take(message.seq);
        if (pending?.kind === 'question') pending.resolve(message.answer);
        return;
      }
      case 'native':
        if (!this.#closed) this.#hearNative(message.event);
        return;
      default:
        unreachable(message, 'message of the transfer thread');
        return;
    }
  }

  #take(seq: number): Pending | undefined {
    const pending = this.#pending.get(seq);
    this.#pending.delete(seq);
    return pending;
  }
}

/** The address, once the thread is ready. Throws what it says instead where it cannot be. */
async function started(worker: Worker): Promise<HostPort> {
  const ended = once(worker, 'exit').then(([code]: unknown[]) => {
    throw new PdError('INTERNAL', `the transfer thread ended at its start with code ${code}`);
  });
  // Either rejects with what the thread has thrown.
  const first = (await Promise.race([once(worker, 'message'), ended])) as [readonly FromTransfer[]];
  const [[message]] = first;
  if (message?.type === 'ready') return message.address;
  if (message?.type === 'not-ready') throw PdError.fromData(message.error);
  throw new PdError('INTERNAL', `the transfer thread began with ${message?.type ?? 'nothing'}`);
}
