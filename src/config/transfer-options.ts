/** The options of a transfer engine, complete and validated. The transfer thread reads this file: types and a few constants, no zod. */
import type { WireLayout } from '../kv/families.ts';
import type { HostPort } from '../net/address.ts';
import type { LogOptions } from '../observability/log-options.ts';
import type { Fingerprint } from '../wire/fingerprint.ts';
import type { SuffixedIds } from '../wire/ids.ts';
import type { SendType } from '../wire/messages.ts';

export const KV_KEYS = ['transfer', 'engine'] as const;
/**
 * What KV is known by. `transfer`: the id that the server gives a request, the same on both ends. `engine`: the engine's own id, as in
 * vLLM, random suffix and all; it matches only where neither end randomizes.
 */
export type KvKey = (typeof KV_KEYS)[number];

/** Bounds on what a peer can make this end do; checked before a byte is accepted. */
export interface TransferLimits {
  /** Largest single tensor, bytes. */
  readonly maxTensorBytes: number;
  /** Tensors the store holds, ready and on their way. */
  readonly maxTensors: number;
  /** Announcements queued or outstanding towards one peer. */
  readonly maxQueuePerPeer: number;
  /** Native connections to producers that stay open at a time: beyond it idle ones are closed, least recently used first. Frozen pairs stay. */
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
   * The family in which blocks are sent to frozen peers (those that speak only the wire of vLLM), and that a tensor of two blocks from such a peer is taken for.
   * Absent: blocks leave as they lie in the cache, as they do between native peers, and two blocks are `kv-first`.
   */
  readonly wireLayout?: WireLayout;
  /** With `engine` no suffix is looked for. */
  readonly kvKey: KvKey;
  /** For which ids of frozen peers a random suffix is looked for. */
  readonly suffixedIds: SuffixedIds;
  /** Addresses and CIDR ranges that may talk to this engine. Absent: everyone. */
  readonly allowPeers?: readonly string[];
  readonly timeouts: TransferTimeouts;
  readonly limits: TransferLimits;
  /** Absent for an engine that exchanges tensors of any model (embedding): no fingerprint is compared. */
  readonly fingerprint?: Fingerprint;
  readonly log: LogOptions;
  /** For the log line at start, if known by then. */
  readonly httpAddress?: string;
  readonly proxyAddress?: string;
}
