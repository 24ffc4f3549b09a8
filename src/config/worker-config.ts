/** One validated shape for a worker: what flags, environment, config file and vLLM's JSON become. Plain data: it crosses threads. */
import type { HostPort } from '../net/address.ts';
import type { EtcdAddress } from '../net/etcd.ts';
import type { CallDialect } from '../parsing/calls.ts';
import type { ReasoningDialect } from '../parsing/reasoning.ts';
import type { KvEventForm } from '../wire/kv-events.ts';
import type { AccessConfig } from './access-options.ts';
import type { TransferOptions } from './transfer-options.ts';

export const WORKER_ROLES = ['producer', 'consumer', 'both'] as const;
export type WorkerRole = (typeof WORKER_ROLES)[number];

export const LOAD_FAILURE_POLICIES = ['recompute', 'fail'] as const;
/** What a consumer does when KV does not come: compute the prompt itself, or end the request with an error. */
export type LoadFailurePolicy = (typeof LOAD_FAILURE_POLICIES)[number];

export const WIRE_CHOICES = ['auto', 'native', 'frozen'] as const;
/**
 * How KV travels between two workers of ours. `auto`: natively where the proxy says so to both ends, which it does where both can. `native`:
 * also where nobody says anything, for pairs without a proxy of ours. `frozen`: as between a worker of ours and one of vLLM.
 */
export type WireChoice = (typeof WIRE_CHOICES)[number];

export const TRANSPORT_CHOICES = ['auto', 'direct', 'nccl', 'host'] as const;
/**
 * How the bytes of a native hand-over travel. `auto`: on a GPU `direct` where both workers are of one host, else `nccl`; on the host `host`.
 * Of two settings the weaker holds.
 */
export type TransportChoice = (typeof TRANSPORT_CHOICES)[number];

export const EXECUTORS = ['host', 'cuda'] as const;

/** `loopback`: clients on this machine. */
export type DebugAudience = 'loopback' | 'anyone';

export interface WorkerConfig {
  /** `both` is an undivided worker: no transfer engine, no ping. */
  readonly role: WorkerRole;
  /** Directory of the checkpoint. */
  readonly modelDir: string;
  /** Ids that /v1/models lists and requests may name; the first is echoed. Never empty. */
  readonly servedModelNames: readonly string[];
  /** How the model writes calls of tools. `auto`: as its chat template says. */
  readonly toolCallParser: CallDialect | 'auto' | 'none';
  /** How it marks what it thinks. `auto`: as its chat template says; `none`: thoughts are part of the answer. */
  readonly reasoningParser: ReasoningDialect | 'auto' | 'none';
  /** What computes. `host` with a cuda device moves KV through GPU memory. */
  readonly executor: (typeof EXECUTORS)[number];
  readonly http: HostPort;
  readonly access: AccessConfig;
  /** Where proxies take pings: addresses, or names that are looked up again and again, each for all its addresses. Empty: no ping. */
  readonly proxy: readonly HostPort[];
  /** etcd, where it registers too. */
  readonly registry?: EtcdAddress;
  /** Host told to the proxy; the port is the one bound. */
  readonly httpAnnounceHost: string;
  /** For the transfer engine; the device and the log are those of the whole worker. Address and fingerprint are added at start. */
  readonly transfer: TransferOptions;
  /** First of the three ports of KV events; 0: any free ones. Absent: none are published. */
  readonly kvEventsPort?: number;
  readonly kvEventsForm: KvEventForm;
  /** Addresses and CIDR ranges of proxies whose token ids of a prompt are taken for its text. Absent: nobody's. */
  readonly promptIdsFrom?: readonly string[];
  /** Who may read GET /debug/state. Absent: nobody. */
  readonly debugState?: DebugAudience;
  /** The same on both ends of a pair, or `auto` on one. */
  readonly wire: WireChoice;
  readonly transport: TransportChoice;
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
  /** Share of the GPU's memory that may be filled, 0 to 1. Executor cuda only. */
  readonly gpuMemoryUtilization: number;
  /** Workers that divide that share. Above 1, memory that other programs hold does not count. Executor cuda only. */
  readonly workersPerGpu: number;
  /** A row's result depends on its own sequence alone, to the bit. The host always computes so. */
  readonly batchInvariant: boolean;
  readonly enablePrefixCaching: boolean;
  /** Random suffix on engine request ids, as vLLM from 0.14. */
  readonly randomizeRequestIds: boolean;
  readonly drainTimeoutMs: number;
  readonly pingIntervalMs: number;
  /** Base URL of the OTLP receiver that gets traces. Absent: none are made. */
  readonly otlpEndpoint?: string;
}
