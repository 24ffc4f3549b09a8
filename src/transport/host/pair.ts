/**
 * Two ranks joined by one TCP connection. Each operation is one frame: its length in 8 bytes, little endian, then the regions one after
 * the other. The receiver knows the length beforehand; the header is there to notice when the two ends have lost step.
 */
import type { MemoryRef } from '../../device/device.ts';
import { hostMemory, hostView } from '../../device/memory.ts';
import { PdError } from '../../errors.ts';
import type { OperationOptions, Pair } from '../transport.ts';
import type { DataSocket } from './data-socket.ts';
import { RegionCursor } from './region-cursor.ts';

const HEADER_BYTES = 8;
/** Bytes handed to the socket at once; two such batches are under way, so that the kernel never waits for us. */
const BATCH_BYTES = 8 * 2 ** 20;
const BATCH_VIEWS = 512;
const BATCHES = 2;

interface Operation {
  readonly verb: 'send' | 'receive';
  readonly cursor: RegionCursor;
  readonly options: OperationOptions;
  readonly resolve: () => void;
  readonly reject: (error: PdError) => void;
  started: boolean;
  /** Bytes that have arrived, or have been flushed to the kernel. */
  done: number;
  timer: NodeJS.Timeout | undefined;
}

export class HostPair implements Pair {
  readonly rank: 0 | 1;
  readonly peer: string;
  readonly over: Promise<PdError>;
  readonly #socket: DataSocket;
  readonly #sends: Operation[] = [];
  readonly #receives: Operation[] = [];
  readonly #header = hostMemory(HEADER_BYTES);
  /** Length of the frame whose header has come and whose receive has not been posted. */
  #announced: number | undefined;
  #batches = 0;
  #reason: PdError | undefined;

  /** The handshake is done; the pair owns the socket. */
  constructor(socket: DataSocket, rank: 0 | 1, peer: string) {
    this.#socket = socket;
    this.rank = rank;
    this.peer = peer;
    this.over = socket.closed.then(() => this.#reason ?? this.#lost(undefined));
    socket.onLost = (error) => this.abort(this.#lost(error));
    this.#readHeader();
  }

  get pending(): number {
    return this.#sends.length + this.#receives.length;
  }

  send(regions: readonly MemoryRef[], options: OperationOptions): Promise<void> {
    return this.#enqueue('send', regions, options);
  }

  receive(regions: readonly MemoryRef[], options: OperationOptions): Promise<void> {
    return this.#enqueue('receive', regions, options);
  }

  abort(reason: PdError): void {
    if (this.#reason) return;
    this.#reason = reason;
    this.#socket.destroy();
    for (const operation of [...this.#sends.splice(0), ...this.#receives.splice(0)]) {
      clearTimeout(operation.timer);
      operation.reject(this.#failure(operation, reason));
    }
  }

  #enqueue(verb: Operation['verb'], regions: readonly MemoryRef[], options: OperationOptions): Promise<void> {
    return new Promise((resolve, reject) => {
      const foreign = regions.find((region) => region.kind !== 'host');
      if (foreign) {
        // Before anything is on the wire: a frame cut short would end the pair for everybody.
        throw new PdError(
          'INTERNAL',
          `${verb} of ${options.tensorId}: the host transport cannot reach ${foreign.kind} memory`,
        );
      }
      const operation: Operation = {
        verb,
        cursor: new RegionCursor(regions),
        options,
        resolve,
        reject,
        started: false,
        done: 0,
        timer: undefined,
      };
      if (this.#reason) {
        reject(this.#failure(operation, this.#reason));
        return;
      }
      const queue = verb === 'send' ? this.#sends : this.#receives;
      queue.push(operation);
      if (queue.length > 1) return;
      if (verb === 'send') this.#startSend();
      else this.#startReceive();
    });
  }

  #startSend(): void {
    const operation = this.#sends[0];
    if (!operation) return;
    this.#start(operation);
    const header = Buffer.alloc(HEADER_BYTES);
    header.writeBigUInt64LE(BigInt(operation.cursor.totalBytes));
    this.#writeBatch(operation, [header]);
    while (this.#batches < BATCHES && operation.cursor.remaining > 0) this.#writeBatch(operation, []);
  }

  /** `views` go first, then as much of the operation as makes a batch. */
  #writeBatch(operation: Operation, views: Uint8Array[]): void {
    const { cursor } = operation;
    const from = cursor.position;
    while (cursor.remaining > 0 && views.length < BATCH_VIEWS && cursor.position - from < BATCH_BYTES) {
      const view = cursor.window(BATCH_BYTES - (cursor.position - from));
      views.push(view);
      cursor.advance(view.length);
    }
    const bytes = cursor.position - from;
    this.#batches++;
    this.#socket.write(views, () => {
      this.#batches--;
      operation.done += bytes;
      if (this.#reason) return;
      if (cursor.remaining > 0) this.#writeBatch(operation, []);
      else if (this.#batches === 0) {
        this.#finish(this.#sends);
        this.#startSend();
      }
    });
  }

  #readHeader(): void {
    this.#socket.read(new RegionCursor([this.#header]), () => {
      const view = hostView(this.#header);
      this.#announced = Number(
        new DataView(view.buffer, view.byteOffset, HEADER_BYTES).getBigUint64(0, true),
      );
      // Without a receive nothing more is read, and the sender waits.
      if (this.#receives.length > 0) this.#startPayload();
    });
  }

  #startReceive(): void {
    const operation = this.#receives[0];
    if (!operation) return;
    this.#start(operation);
    if (this.#announced !== undefined) this.#startPayload();
  }

  #startPayload(): void {
    const operation = this.#receives[0]!;
    const { cursor, options } = operation;
    const announced = this.#announced;
    this.#announced = undefined;
    if (announced !== cursor.totalBytes) {
      this.abort(
        new PdError(
          'KV_SHAPE_MISMATCH',
          `${this.peer} sends ${announced} bytes where ${cursor.totalBytes} are expected for ${options.tensorId}`,
          { peer: this.peer, tensorId: options.tensorId },
        ),
      );
      return;
    }
    this.#socket.read(cursor, () => {
      if (this.#reason) return;
      this.#finish(this.#receives);
      this.#readHeader();
      this.#startReceive();
    });
  }

  #start(operation: Operation): void {
    operation.started = true;
    const { timeoutMs } = operation.options;
    operation.timer = setTimeout(() => {
      // One more turn, so that a thread that was busy takes what has come meanwhile before it gives up.
      setImmediate(() => {
        if (!operation.timer) return;
        this.abort(
          new PdError('TRANSFER_TIMEOUT', `deadline of ${timeoutMs} ms passed`, { peer: this.peer }),
        );
      });
    }, timeoutMs);
  }

  #finish(queue: Operation[]): void {
    const operation = queue.shift()!;
    clearTimeout(operation.timer);
    operation.timer = undefined;
    operation.resolve();
  }

  #lost(error: Error | undefined): PdError {
    const why = error ? `the connection broke: ${error.message}` : 'the peer closed the connection';
    return new PdError('PEER_LOST', `pair with ${this.peer}: ${why}`, { peer: this.peer }, { cause: error });
  }

  /** What became of one operation when the pair ended. */
  #failure(operation: Operation, reason: PdError): PdError {
    const { verb, cursor, options, started } = operation;
    const bytes = verb === 'receive' ? cursor.position : operation.done;
    const far = started ? `${bytes} of ${cursor.totalBytes} bytes done` : 'not started';
    const way = verb === 'send' ? `to ${this.peer}` : `from ${this.peer}`;
    return new PdError(
      reason.code,
      `${verb} of ${options.tensorId} ${way} (${far}): ${reason.message}`,
      { ...reason.context, peer: this.peer, tensorId: options.tensorId },
      { cause: reason },
    );
  }
}
