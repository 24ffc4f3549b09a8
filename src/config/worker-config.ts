/** One validated shape for a worker: what flags, environment, config file and vLLM's JSON become. Plain data: it crosses threads. */
import type { WireLayout } from '../kv/families.ts';
import type { HostPort } from '../net/address.ts';
import type { KvKey, LogOptions, SendType, TransferLimits, TransferTimeouts } from '../transfer/types.ts';
import type { SuffixedIds } from '../wire/ids.ts';

export type WorkerRole = 'producer' | 'consumer' | 'both';
export type LoadFailurePolicy = 'recompute' | 'fail';

/** `loopback`: clients on this machine. */
export type DebugAudience = 'loopback' | 'anyone';

export interface WorkerConfig {
  /** `both` is an undivided worker: no transfer engine, no ping. */
  readonly role: WorkerRole;
  /** Directory of the checkpoint. */
  readonly modelDir: string;
  /** Ids that /v1/models lists and requests may name; the first is echoed. Never empty. */
  readonly servedModelNames: readonly string[];
  /** `host` or `cuda:N`: where KV and received KV live. */
  readonly device: string;
  /** What computes. `host` with a cuda device moves KV through GPU memory. */
  readonly executor: 'host' | 'cuda';
  readonly http: HostPort;
  readonly kv: { readonly bind: HostPort; readonly announceHost: string; readonly rank: number };
  /** Absent: no ping. */
  readonly proxy?: HostPort & {
    /** Further addresses of its name, tried in turn. */
    readonly otherHosts?: readonly string[];
  };
  /** `ip:port` told to the proxy, where it differs from what is bound. */
  readonly httpAnnounceHost: string;
  readonly sendType: SendType;
  readonly kvBufferSize: number;
  readonly memPoolSize: number;
  readonly ncclNumChannels: number;
  /** Family of tensors towards peers that are not ours. Absent: `kv-first`. */
  readonly wireLayout?: WireLayout;
  /** What KV is known by. Absent: `transfer`. */
  readonly kvKey?: KvKey;
  /** For which ids of peers that are not ours a random suffix is looked for. Absent: `proxy`. */
  readonly suffixedIds?: SuffixedIds;
  /** Addresses and CIDR ranges that may talk to the KV listener. Absent: everyone. */
  readonly allowPeers?: readonly string[];
  /** Who may read GET /debug/state. Absent: nobody. */
  readonly debugState?: DebugAudience;
  readonly loadFailure: LoadFailurePolicy;
  readonly maxNumSeqs: number;
  readonly maxNumBatchedTokens: number;
  /** Most tokens of one sequence, prompt and output. Absent: the model's own. */
  readonly maxModelLen?: number;
  /** Directory for the logits of every sampled token. Absent: none are written. */
  readonly debugLogits?: string;
  readonly blockSize: number;
  /** Absent: chosen from maxNumSeqs and maxModelLen (host) or free memory (cuda). */
  readonly numBlocks?: number;
  /** Share of the GPU's memory that may be filled, 0 to 1. Absent: 0.9. Executor cuda only. */
  readonly gpuMemoryUtilization?: number;
  /** A row's result hangs on its own sequence alone, to the bit. The host always computes so. Absent: false. */
  readonly batchInvariant?: boolean;
  readonly enablePrefixCaching: boolean;
  /** Random suffix on engine request ids, as vLLM from 0.14. */
  readonly randomizeRequestIds: boolean;
  readonly timeouts: TransferTimeouts;
  readonly limits: TransferLimits;
  readonly drainTimeoutMs: number;
  readonly pingIntervalMs: number;
  readonly log: LogOptions;
}

export interface ProxyConfig {
  readonly http: HostPort;
  readonly discovery: HostPort;
  /** Addresses and CIDR ranges whose pings are taken. Absent: everyone's. */
  readonly allowInstances?: readonly string[];
  /** An instance whose last ping is older than this is removed. */
  readonly instanceTimeoutMs: number;
  /** For the prefill request, headers to end of body. */
  readonly prefillTimeoutMs: number;
  /** Between two chunks of the decode instance's answer. */
  readonly decodeIdleTimeoutMs: number;
  /** Most requests in prefill at a producer for which the consumer is asked at the same time; 0: always in turn. */
  readonly overlap: number;
  readonly drainTimeoutMs: number;
  readonly log: LogOptions;
}
