/** What main thread and core thread say to each other. Plain data: structured clone. */
import type { WorkerConfig } from '../config/worker-config.ts';
import type { ErrorData } from '../errors.ts';
import type { Timeline } from '../observability/timelines.ts';
import type { CacheChange, CoreRequest, RequestOutput } from '../scheduler/types.ts';
import type { HandOverStage, HandOverState } from '../transfer/native/hand-over-api.ts';
import type { TransferState } from '../transfer/types.ts';
import type { Fingerprint } from '../wire/fingerprint.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';
import type { KvEventPorts, PingMessage } from '../wire/messages.ts';

/** `workerData` of the core thread. */
export interface CoreInit {
  readonly config: WorkerConfig;
  /** Metrics pages (observability/metrics.ts): the core's own and the one for the transfer thread it starts. */
  readonly metrics: { readonly core: SharedArrayBuffer; readonly transfer: SharedArrayBuffer };
}

export interface CoreInfo {
  /** KV address as told to others; absent for role `both`. */
  readonly kvAddress?: string;
  readonly maxModelLen: number;
  readonly numBlocks: number;
  readonly blockSize: number;
  readonly vocabSize: number;
  readonly fingerprint: Fingerprint;
}

/**
 * Of a prompt in the core, which knows it by its transfer id: `received` from the main thread, computed in one or several steps (`step`: one
 * begins) until its first token is `drawn` or has come with its KV, and `posted`. By the frozen wire, its KV has been `saved` at the
 * producer, and is `loading` at the consumer; of either wire the load is over, well or not (`load ended`).
 */
export type CoreStage =
  | 'received'
  | 'step'
  | 'drawn'
  | 'saved'
  | 'loading'
  | 'load ended'
  | 'posted'
  | HandOverStage;

export interface CoreState {
  readonly running: number;
  readonly waiting: number;
  readonly loading: number;
  readonly blocks: { readonly used: number; readonly cached: number; readonly total: number };
  /** What `checkIntegrity()` of scheduler and block manager says, where it was asked for: empty when all is well. */
  readonly integrity?: readonly string[];
  /** With `integrity`. */
  readonly recentRequests?: readonly Timeline<CoreStage>[];
  readonly transfer?: TransferState;
  /** Of the native hand-over, where it is spoken. */
  readonly handOver?: HandOverState;
  /** What a ping of this instance says now; absent before it serves, and for what is no instance of a pair. */
  readonly ping?: PingMessage;
}

export type ToCore =
  | { readonly type: 'add'; readonly request: CoreRequest }
  | { readonly type: 'abort'; readonly requestId: EngineRequestId; readonly index?: number }
  /** `integrity`: with a look through every block, which takes seconds where there are millions. */
  | { readonly type: 'state'; readonly seq: number; readonly integrity: boolean }
  /** When these requests passed which stages. */
  | { readonly type: 'timelines'; readonly seq: number; readonly transferIds: readonly TransferId[] }
  /** KV of these requests is no longer of use: nobody will fetch it, or bring it. */
  | { readonly type: 'release'; readonly transferIds: readonly TransferId[] }
  /** The producer is done with the prompts of these requests. */
  | { readonly type: 'prefilled'; readonly transferIds: readonly TransferId[] }
  /** Their producer could not send the KV of these requests. */
  | { readonly type: 'kv-failed'; readonly transferIds: readonly TransferId[]; readonly reason: ErrorData }
  /** HTTP is up: start the pings. `events`: where what this core says of its cache is published. `tokenizer`: digest of what it reads by. */
  | {
      readonly type: 'serve';
      readonly httpAddress: string;
      readonly tokenizer: string;
      readonly events?: KvEventPorts;
    }
  /** No more pings; requests under way go on. */
  | { readonly type: 'drain' }
  /** Ends the thread: transfer engine first. */
  | { readonly type: 'shutdown' };

export type FromCore =
  | { readonly type: 'ready'; readonly info: CoreInfo }
  | { readonly type: 'outputs'; readonly outputs: readonly RequestOutput[] }
  /** KV of a request whose output said that it was `opening`: under way now, or lost. */
  | { readonly type: 'kv-saved'; readonly requestId: EngineRequestId; readonly error?: ErrorData }
  | { readonly type: 'state'; readonly seq: number; readonly state: CoreState }
  /** Without those that are not known, or not any more. */
  | {
      readonly type: 'timelines';
      readonly seq: number;
      readonly timelines: readonly Timeline<CoreStage>[];
    }
  /** Where KV events are published: what has entered and left the prefix cache. */
  | { readonly type: 'cache'; readonly changes: readonly CacheChange[] }
  /** The core cannot go on; the process ends with this error. */
  | { readonly type: 'fatal'; readonly error: ErrorData }
  | { readonly type: 'closed' };
