/**
 * A pair of ranks that exchanges bytes: one interface, `host` (TCP) and `nccl` behind it. Used by the transfer thread alone.
 *
 * Both ends of a pair call `open` with the same 128 bytes: rank 0 made them and sent them in NEW. After that, each `send` on one end
 * meets the `receive` that stands at the same place in the other end's order; their region lists have the same lengths in bytes.
 */
import type { MemoryRef } from '../device/device.ts';
import type { PdError } from '../errors.ts';
import type { UniqueId } from '../wire/messages.ts';

export interface OpenOptions {
  readonly uniqueId: UniqueId;
  /** The side that sent NEW is rank 0. */
  readonly rank: 0 | 1;
  /** The peer's `ip:port`, for messages. */
  readonly peer: string;
  /** After this long without a peer, `open` rejects with PAIR_INIT_TIMEOUT and all that it took is given back. */
  readonly timeoutMs: number;
}

export interface OperationOptions {
  /** For messages: which tensor. */
  readonly tensorId: string;
  /** From the start of this operation on the wire, not from the call: earlier ones have deadlines of their own. */
  readonly timeoutMs: number;
}

export interface Pair {
  readonly rank: 0 | 1;
  readonly peer: string;
  /**
   * Sends the regions as one grouped operation; operations keep their order. Resolves when the source may be reused. Rejects with
   * TRANSFER_TIMEOUT, PEER_LOST, PAIR_CLOSED or NCCL_ERROR, and then the pair is over: whatever was queued behind it rejects too.
   */
  send(regions: readonly MemoryRef[], options: OperationOptions): Promise<void>;
  /** Receives into the regions. Resolves when the bytes are there and ordered before work enqueued from now on. Rejects as `send`. */
  receive(regions: readonly MemoryRef[], options: OperationOptions): Promise<void>;
  /** Operations that have not settled. */
  readonly pending: number;
  /**
   * Resolves, once, with the reason when the pair is over: aborted, closed, or the peer found gone. Only then may memory of failed
   * operations be reused: until then the transport may still write to it.
   */
  readonly over: Promise<PdError>;
  /** Ends the pair at once. Idempotent; pending operations reject with `reason`. */
  abort(reason: PdError): void;
}

export interface Transport {
  readonly kind: 'host' | 'nccl';
  /** For rank 0, before it sends NEW. */
  createUniqueId(): UniqueId;
  open(options: OpenOptions): Promise<Pair>;
  /** Aborts every pair. Idempotent. */
  dispose(): Promise<void>;
}
