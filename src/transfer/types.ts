/** What the transfer engine is told and what it answers. Plain data: all of it crosses between threads. */
import type { EventRef, MemoryRef, PagedLayer } from '../device/device.ts';
import type { ErrorData } from '../errors.ts';
import type { WireLayout } from '../kv/families.ts';
import type { HostPort } from '../net/address.ts';
import type { Dtype } from '../wire/dtype.ts';
import type { SuffixedIds, TensorId, TransferId } from '../wire/ids.ts';
import type { FailureState } from './failures.ts';

export const SEND_TYPES = ['PUT', 'PUT_ASYNC', 'GET'] as const;
/**
 * PUT: the producer sends, and a save waits until all is sent. PUT_ASYNC: the producer sends in the background. GET: the producer
 * keeps, the consumer asks. Both ends must agree.
 */
export type SendType = (typeof SEND_TYPES)[number];

export const KV_KEYS = ['transfer', 'engine'] as const;
/**
 * What KV is known by. `transfer`: the id that the server gives a request, the same on both ends. `engine`: the engine's own id, as in
 * vLLM, random suffix and all; it matches only where neither end randomizes.
 */
export type KvKey = (typeof KV_KEYS)[number];

/** What identifies the model and its KV to a peer. Unequal digests never exchange KV; the fields say why. */
export interface Fingerprint {
  /** Hex SHA-256 over all fields but `model`: one checkpoint may lie under two names. */
  readonly digest: string;
  /** Checkpoint name for people. */
  readonly model: string;
  /** Hex SHA-256 of configuration, tensor index and sampled weights. */
  readonly weights: string;
  readonly dtype: Dtype;
  readonly blockSize: number;
  readonly layers: number;
  readonly heads: number;
  readonly headDim: number;
}

/** Bounds on what a peer may make us do; checked before a byte is taken. */
export interface TransferLimits {
  /** Largest single tensor, bytes. */
  readonly maxTensorBytes: number;
  /** Tensors the store holds, ready and on their way. */
  readonly maxTensors: number;
  /** Announcements queued or outstanding towards one peer. */
  readonly maxQueuePerPeer: number;
  /** Pairs that stay open at a time: beyond it those that are idle are closed, least recently used first. Peers that are not ours never are. */
  readonly maxPeers: number;
}

/** All in milliseconds. */
export interface TransferTimeouts {
  readonly connect: number;
  readonly answer: number;
  readonly pairInit: number;
  /** One tensor on the wire. */
  readonly transfer: number;
  /** From asking for KV to having it. */
  readonly load: number;
  /** KV that no request claims is freed after this. */
  readonly orphan: number;
}

export const DEFAULT_TIMEOUTS: TransferTimeouts = {
  connect: 5_000,
  answer: 5_000,
  pairInit: 30_000,
  transfer: 30_000,
  load: 60_000,
  orphan: 60_000,
};

export const DEFAULT_LIMITS: TransferLimits = {
  maxTensorBytes: 4 * 2 ** 30,
  maxTensors: 65_536,
  maxQueuePerPeer: 16_384,
  maxPeers: 64,
};

export const LOG_LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'silent'] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];

export const LOG_FORMATS = ['auto', 'pretty', 'json'] as const;

export interface LogOptions {
  readonly level: LogLevel;
  /** `pretty` for a terminal, `json` for collectors, `auto` by whether stdout is a terminal. */
  readonly format: (typeof LOG_FORMATS)[number];
}

export interface ProxyPing {
  readonly proxy: HostPort & {
    /** Where its name has several addresses, the others: each is tried in turn until one takes a ping. */
    readonly otherHosts?: readonly string[];
  };
  readonly type: 'P' | 'D';
  readonly httpAddress: string;
  readonly intervalMs: number;
  /** What the HTTP server behind it can do, for the proxy. */
  readonly features?: readonly string[];
}

/** How to make a transfer engine. Everything has been validated before (`config/`). */
export interface TransferOptions {
  /** `host`, or `cuda:N`. */
  readonly device: string;
  /** Where the ROUTER binds: KV host and base port; this rank's own port is `port + rank`. Port 0 lets the system choose. */
  readonly bind: HostPort;
  /** The host that is told to others (the port is the one bound). */
  readonly announceHost: string;
  readonly rank: number;
  readonly sendType: SendType;
  /** Bytes of device memory for received (or, in GET, kept) KV: the threshold. */
  readonly kvBufferSize: number;
  /** Most bytes of host memory past the threshold; grows on demand. */
  readonly memPoolSize: number;
  readonly ncclNumChannels: number;
  /**
   * The family in which blocks are sent to peers that are not ours, and that a tensor of two blocks from such a peer is taken for.
   * Absent: blocks leave as they lie in the cache, as they do between ours, and two blocks are `kv-first`.
   */
  readonly wireLayout?: WireLayout;
  /** With `engine` no suffix is looked for. */
  readonly kvKey: KvKey;
  /** For which ids of peers that are not ours a random suffix is looked for. */
  readonly suffixedIds: SuffixedIds;
  /** Addresses and CIDR ranges that may talk to this engine. Absent: everyone. */
  readonly allowPeers?: readonly string[];
  readonly timeouts: TransferTimeouts;
  readonly limits: TransferLimits;
  /** Absent for an engine that exchanges tensors of any model (embedding): no fingerprint is compared. */
  readonly fingerprint?: Fingerprint;
  readonly log: LogOptions;
  /** Told in the log line at start, where they are known by then. */
  readonly httpAddress?: string;
  readonly proxyAddress?: string;
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

/** How a save stands. `gathered`: source blocks may be reused. `sent`: the bytes have left (PUT) or are kept for asking (GET). */
export type SendProgress =
  | { readonly kind: 'gathered' }
  | { readonly kind: 'sent'; readonly bytes: number }
  | { readonly kind: 'failed'; readonly error: ErrorData };

/** One pair as `/debug/state` shows it. */
export interface PairState {
  readonly peer: string;
  readonly direction: 'outgoing' | 'incoming';
  readonly state: 'connecting' | 'opening' | 'open' | 'closing' | 'over';
  readonly ours: boolean;
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
