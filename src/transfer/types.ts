/** What the transfer engine is told and what it answers. Plain data: all of it crosses between threads. */

import type { KvKey } from '../config/transfer-options.ts';
import type { EventRef, MemoryRef, PagedLayer } from '../device/device.ts';
import type { HostPort } from '../net/address.ts';
import type { EtcdAddress } from '../net/etcd.ts';
import type { Dtype } from '../wire/dtype.ts';
import type { TensorId, TransferId } from '../wire/ids.ts';
import type { KvEventPorts, SendType } from '../wire/messages.ts';
import type { FailureState } from './failures.ts';

export interface ProxyPing {
  /** Where proxies take pings. Of a name every address is pinged that takes them, and it is looked up again every ten seconds. */
  readonly proxies: readonly HostPort[];
  /** etcd, where this instance registers too. */
  readonly registry?: EtcdAddress;
  readonly type: 'P' | 'D';
  readonly httpAddress: string;
  readonly intervalMs: number;
  /** What the HTTP server behind it can do, for the proxy. */
  readonly features?: readonly string[];
  /** Where KV events of this worker are published. */
  readonly events?: KvEventPorts;
  /** `PingHello.tokenizer`. */
  readonly tokenizer?: string;
  /** `PingHello.started`. */
  readonly started?: number;
}

/** What `send` sends: bytes where they lie, or blocks of a paged cache, which are gathered first. */
export type SendSource =
  | { readonly kind: 'flat'; readonly memory: MemoryRef }
  | { readonly kind: 'blocks'; readonly layer: PagedLayer; readonly blockIds: Int32Array };

export interface SendRequest {
  readonly tensorId: TensorId;
  readonly shape: readonly number[];
  readonly dtype: Dtype;
  readonly source: SendSource;
  /** The work that produces the source; the gather waits for it. */
  readonly ready?: EventRef;
  /** Tokens that the blocks hold, for families without blocks. Absent: all that fit. */
  readonly numTokens?: number;
  /** ZMQ address of the peer's same rank. Absent in GET: whoever asks gets it. */
  readonly peer?: HostPort;
  /** Of the prompt that this is KV of: a load that wants another prompt's does not take it. At most 64 characters. */
  readonly promptDigest?: string;
}

/** One tensor that has come, in memory the store owns until the request is finished. */
export interface StoredTensor {
  readonly tensorId: TensorId;
  readonly shape: readonly number[];
  readonly dtype: Dtype;
  readonly memory: MemoryRef;
}

/** KV of one request to be taken into a paged cache, all layers at once; layers arrive in any order. */
export interface LoadRequest {
  /** The caller's own name for it: for `cancelLoad`, messages and the log. */
  readonly requestId: string;
  /** What its KV is known by. One load of a transfer id is under way at a time. */
  readonly transferId: TransferId;
  /** As in SendRequest: KV that is told to be of another prompt is not taken. */
  readonly promptDigest?: string;
  /** In GET, whom to ask; in PUT, for messages and for failing early when that peer's pair ends. */
  readonly peer: HostPort;
  /** Layer name and where it goes. A tensor of the request that names another layer fails the load, unless a `receive` waits for it. */
  readonly layers: readonly { readonly name: string; readonly target: PagedLayer }[];
  readonly blockIds: Int32Array;
  /** Leading blocks that the consumer already has. */
  readonly skipBlocks: number;
  /** Tokens from the first that the KV must cover: a tensor with room for fewer does not fit. Absent: all that fit into the blocks. */
  readonly numTokens?: number;
  /** Overrides `timeouts.load`. */
  readonly timeoutMs?: number;
  /** The producer may still compute the prompt for so long: added to the deadline, until `prefilled` says that it has ended. */
  readonly prefillWithinMs?: number;
}

export interface LoadResult {
  readonly requestId: string;
  /** Bytes scattered into the cache plus those skipped: whole tensors. */
  readonly bytes: number;
  /** From the start of the load to the last layer in place. */
  readonly milliseconds: number;
}

/** One pair as `/debug/state` shows it. */
export interface PairState {
  readonly peer: string;
  readonly direction: 'outgoing' | 'incoming';
  readonly state: 'connecting' | 'opening' | 'open' | 'over';
  /** The peer is known to be a pd-worker; else it is taken for one that speaks the frozen wire alone. */
  readonly native: boolean;
  readonly queued: number;
  readonly outstanding: number;
  readonly sinceMs: number;
}

export interface TransferState {
  readonly address: string;
  readonly sendType: SendType;
  readonly kvKey: KvKey;
  readonly pairs: readonly PairState[];
  readonly buffer: { readonly usedBytes: number; readonly thresholdBytes: number };
  readonly pool: { readonly usedBytes: number; readonly reservedBytes: number; readonly limitBytes: number };
  /** Tensors held: of requests not finished yet, or unclaimed. */
  readonly tensors: number;
  readonly waiting: readonly {
    readonly requestId: string;
    readonly tensorId: string;
    readonly peer: string;
    readonly sinceMs: number;
    readonly deadlineMs: number;
    /** Tensors whose ids look like its own: perhaps the same request under a suffix. */
    readonly nearMisses: readonly string[];
    /** The producer may still be computing the prompt: then this wait is as it should be. */
    readonly prefilling?: true;
  }[];
  /** The last of each kind with each peer, newest first. */
  readonly failures: readonly FailureState[];
}
