/**
 * The transfer engine as its users see it: the façade before the transfer thread. Works from any thread; a connector, a benchmark and
 * an embedder hold the same thing.
 */
import type { MemoryRef } from '../device/device.ts';
import type { ErrorData } from '../errors.ts';
import type { HostPort } from '../net/address.ts';
import type { TensorId, TransferId } from '../wire/ids.ts';
import type { WorkerLoad } from '../wire/messages.ts';
import type {
  LoadRequest,
  LoadResult,
  ProxyPing,
  SendRequest,
  StoredTensor,
  TransferState,
} from './types.ts';

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

export interface TransferEngineApi {
  /** The ROUTER's `host:port` as told to others. */
  readonly address: HostPort;
  /** Never throws: failures come by the handle's promises. Order per peer is kept. */
  send(request: SendRequest): SendHandle;
  /**
   * As `send` for each. In one message to the transfer thread, so that tensors of one request (its layers) are gathered and sent
   * together. Where the model computes layer by layer, `send` each as it is there instead.
   */
  sendAll(requests: readonly SendRequest[]): SendHandle[];
  /** Waits for one tensor (PUT) or asks `peer` for it (GET). It belongs to the caller until `finish` names its request. */
  receive(tensorId: TensorId, peer: HostPort, timeoutMs?: number): Promise<StoredTensor>;
  /** Takes the KV of one request into paged blocks. Rejects with KV_LOAD_TIMEOUT or KV_LOAD_FAILED (cause inside the message). */
  load(request: LoadRequest): Promise<LoadResult>;
  /** Gives up a load under way; its promise rejects with REQUEST_ABORTED once no write into the blocks can happen any more. */
  cancelLoad(requestId: string): void;
  /** The producer is done with the prompt: loads of it that were told `prefillWithinMs` have `timeouts.load` from now. */
  prefilled(id: TransferId): void;
  /** The producer has told that it could not send this KV: a load of it, under way or to come, fails at once, with `reason` inside. */
  sendFailed(id: TransferId, reason: ErrorData): void;
  /** The request is over: frees what is held for it, and drops and frees what still comes. `keep`: its sends in GET stay to be asked for. */
  finish(id: TransferId, options?: { readonly keepSends?: boolean }): void;
  /** Starts the pings to the proxies: only once the instance can serve. */
  startPing(ping: ProxyPing): void;
  stopPing(): void;
  /** What pings say from now on; the next leaves at once. */
  reportLoad(load: WorkerLoad): void;
  state(): Promise<TransferState>;
  /** A CPU view of host or pinned memory; see Device.view. */
  view(memory: MemoryRef): Uint8Array;
  /** Ends every pair and the thread. Idempotent, bounded in time. */
  dispose(): Promise<void>;
}
