/** The transfer engine as its users hold it: starts the transfer thread, and turns calls into messages and messages into promises. */
import { Worker } from 'node:worker_threads';
import type { TransferOptionsInput } from '../config/embedded.ts';
import type { TransferOptions } from '../config/transfer-options.ts';
import { deferred } from '../deferred.ts';
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
import type { SendHandle, TransferEngineApi } from './engine-api.ts';
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

/** What waits for a message of the thread. Each kind of question is answered by its own kinds of message. */
type Pending =
  | {
      readonly kind: 'send';
      gathered(): void;
      underWay(): void;
      sent(bytes: number): void;
      reject(error: PdError): void;
    }
  | { readonly kind: 'receive'; resolve(tensor: StoredTensor): void; reject(error: PdError): void }
  | { readonly kind: 'load'; resolve(result: LoadResult): void; reject(error: PdError): void }
  | { readonly kind: 'state'; resolve(state: TransferState): void; reject(error: PdError): void };

export interface TransferEngineExtras {
  /** `buffer` of the MetricsPage that the transfer thread writes. */
  readonly metrics?: SharedArrayBuffer;
  /**
   * For `HandOver`, which speaks through this engine.
   * @internal
   */
  readonly native?: NativeInit;
}

/** Moves tensors and paged KV between peers. Dispose it: its thread keeps the process alive. */
export class TransferEngine implements TransferEngineApi {
  readonly address: HostPort;
  /** `host` or `cuda:N`. */
  readonly #deviceName: string;
  readonly #worker: Worker;
  /** For views of pinned memory; host memory needs none. */
  readonly #device: Device | undefined;
  readonly #exited: Promise<void>;
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
    this.#exited = new Promise((resolve) => worker.once('exit', () => resolve()));
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
      throw error;
    }
  }

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
    this.#ask(message, {
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

  receive(tensorId: TensorId, peer: HostPort, timeoutMs?: number): Promise<StoredTensor> {
    return new Promise((resolve, reject) =>
      this.#ask((seq) => ({ type: 'receive', seq, tensorId, peer, timeoutMs }), {
        kind: 'receive',
        resolve,
        reject,
      }),
    );
  }

  load(request: LoadRequest): Promise<LoadResult> {
    const message = (seq: number): ToTransfer => {
      checkLoad(request, this.#deviceName);
      return { type: 'load', seq, request };
    };
    return new Promise((resolve, reject) => this.#ask(message, { kind: 'load', resolve, reject }));
  }

  prefilled(id: TransferId): void {
    this.#tell({ type: 'prefilled', id });
  }

  sendFailed(id: TransferId, reason: ErrorData): void {
    this.#tell({ type: 'send-failed', id, reason });
  }

  cancelLoad(requestId: string): void {
    this.#tell({ type: 'cancel-load', requestId });
  }

  finish(id: TransferId, options: { readonly keepSends?: boolean } = {}): void {
    this.#tell({ type: 'finish', id, keepSends: options.keepSends ?? false });
  }

  startPing(ping: ProxyPing): void {
    this.#tell({ type: 'start-ping', ping });
  }

  stopPing(): void {
    this.#tell({ type: 'stop-ping' });
  }

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
    return new Promise((resolve, reject) =>
      this.#ask((seq) => ({ type: 'state', seq }), { kind: 'state', resolve, reject }),
    );
  }

  view(memory: MemoryRef): Uint8Array {
    return this.#device ? this.#device.view(memory) : hostView(memory);
  }

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
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<'late'>((resolve) => {
      timer = setTimeout(() => resolve('late'), CLOSE_TIMEOUT_MS);
    });
    if ((await Promise.race([this.#exited, late])) === 'late') await this.#worker.terminate();
    clearTimeout(timer);
    this.#fail('the transfer engine has been disposed');
    this.#device?.dispose();
  }

  #ask(message: (seq: number) => ToTransfer, pending: Pending): void {
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
      case 'received': {
        const pending = this.#take(message.seq);
        if (pending?.kind === 'receive') pending.resolve(message.tensor);
        return;
      }
      case 'loaded': {
        const pending = this.#take(message.seq);
        if (pending?.kind === 'load') pending.resolve(message.result);
        return;
      }
      case 'native':
        if (!this.#closed) this.#hearNative(message.event);
        return;
      case 'state': {
        const pending = this.#take(message.seq);
        if (pending?.kind === 'state') pending.resolve(message.state);
        return;
      }
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

/** The address, once the thread is ready; what it says instead where it cannot be. */
function started(worker: Worker): Promise<HostPort> {
  return new Promise((resolve, reject) => {
    const end = () => {
      worker.off('message', onMessage);
      worker.off('error', onError);
      worker.off('exit', onExit);
    };
    const onMessage = ([message]: readonly FromTransfer[]) => {
      end();
      if (!message) return reject(new PdError('INTERNAL', 'the transfer thread began with nothing'));
      if (message.type === 'ready') resolve(message.address);
      else if (message.type === 'not-ready') reject(PdError.fromData(message.error));
      else reject(new PdError('INTERNAL', `the transfer thread began with ${message.type}`));
    };
    const onError = (error: unknown) => {
      end();
      reject(PdError.from(error));
    };
    const onExit = (code: number) => {
      end();
      reject(new PdError('INTERNAL', `the transfer thread ended at its start with code ${code}`));
    };
    worker.on('message', onMessage).on('error', onError).on('exit', onExit);
  });
}
