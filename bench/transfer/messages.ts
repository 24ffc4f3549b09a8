/** What the benchmark tells its peers (a process each, one engine on one device) and what they answer. Plain data over the process channel. */

import type { TransferTimeouts } from '../../src/config/transfer-options.ts';
import type { ErrorData } from '../../src/errors.ts';
import type { HostPort } from '../../src/net/address.ts';
import type { LogLevel } from '../../src/observability/log-options.ts';
import type { SendType } from '../../src/wire/messages.ts';
import type { Environment } from '../measure/machine.ts';
import type { KvShape } from './shape.ts';

/** How a peer starts: one argument, as JSON. */
export interface PeerSetup {
  readonly device: string;
  readonly shape: KvShape;
  /** Bytes of the area from which tensors are sent, or in which the paged caches lie. */
  readonly areaBytes: number;
  /** The longest run of bytes that is filled and checked at once: a whole layer's cache, or the largest flat tensor. */
  readonly largestBytes: number;
  /** Absent for a peer without an engine: ceilings, memory readings. */
  readonly engine?: EngineSetup;
  readonly ncclNumChannels: number;
  /** Loads the compute loop's kernels: only before the first pair opens. */
  readonly compute: boolean;
}

export interface EngineSetup {
  readonly sendType: SendType;
  /** 0: any free port. A restarted peer takes the one it had. */
  readonly port: number;
  readonly kvBufferSize: number;
  readonly memPoolSize: number;
  readonly timeouts: TransferTimeouts;
  readonly logLevel: LogLevel;
}

/** The KV of one request: all layers, paged blocks to paged blocks by two random block tables; gathered and scattered. */
export interface PagedJob {
  readonly kind: 'paged';
  readonly id: string;
  readonly tokens: number;
  /** Pattern stream `stream + i` fills layer `i`; streams behind them hold what the target has before. */
  readonly stream: number;
  /** Chooses the block tables. */
  readonly seed: number;
  /** Which of several caches of the target it goes to, so that a row of requests can be looked at afterwards. */
  readonly slot: number;
}

/** `count` dense tensors, as they lie; no gather, no scatter. */
export interface FlatJob {
  readonly kind: 'flat';
  readonly id: string;
  readonly count: number;
  readonly bytes: number;
  /** Pattern stream `stream + i` fills tensor `i`. */
  readonly stream: number;
  /** Tensors are sent, and asked for, last first. */
  readonly order?: 'reverse';
}

/** What is moved under one id. */
export type Job = PagedJob | FlatJob;

export type Command =
  /** Writes the pattern: at the source what is sent, at a paged target what must be overwritten or left alone. */
  | { readonly do: 'fill'; readonly job: Job; readonly side: 'source' | 'target' }
  /** Starts a load or receives; answers once the transfer thread has taken them up. */
  | { readonly do: 'arm'; readonly job: Job; readonly peer: HostPort; readonly timeoutMs?: number }
  /** Answers when all of the job is usable here. */
  | { readonly do: 'wait'; readonly id: string }
  /** Sends all of the job; answers when all has left. */
  | { readonly do: 'send'; readonly job: Job; readonly peer: HostPort }
  /** Compares every byte of what has come. */
  | { readonly do: 'check'; readonly job: Job }
  | { readonly do: 'finish'; readonly id: string }
  /** Sends request after request, `window` at a time, until `stop`; answers with how many. Not checked. */
  | { readonly do: 'pump'; readonly job: PagedJob; readonly peer: HostPort; readonly window: number }
  /** Takes what `pump` sends, until `stop` says how many there were. */
  | { readonly do: 'drain'; readonly job: PagedJob; readonly peer: HostPort; readonly window: number }
  | { readonly do: 'stop'; readonly count?: number }
  /** The compute loop for `ms`. */
  | { readonly do: 'compute'; readonly loop: ComputeLoop; readonly ms: number }
  /** One row of kernels that keeps the GPU busy for about `ms`; answers once they are enqueued. */
  | { readonly do: 'occupy'; readonly ms: number }
  | { readonly do: 'memory' }
  /** The raw transport, without an engine: the ceiling. Rank 0 makes the id and sends, rank 1 receives. */
  | { readonly do: 'raw-id' }
  | { readonly do: 'raw-open'; readonly uniqueId: Uint8Array; readonly rank: 0 | 1 }
  | {
      readonly do: 'raw-send' | 'raw-receive';
      /** Bytes of each region of one grouped operation. */
      readonly regions: readonly number[];
      readonly rounds: number;
    }
  /** The copy engine from this peer's device to `target`, or memcpy on the host. */
  | { readonly do: 'device-copy'; readonly target: string; readonly bytes: number; readonly rounds: number }
  | { readonly do: 'clock' }
  | { readonly do: 'environment' }
  /** Disposes the engine and exits. */
  | { readonly do: 'quit' };

/** `matmul`: tensor-core products in registers, bound by arithmetic. `memory`: paged copies, bound by memory. */
export const COMPUTE_LOOPS = ['matmul', 'memory'] as const;
export type ComputeLoop = (typeof COMPUTE_LOOPS)[number];

/** All times are `process.hrtime`, milliseconds: CLOCK_MONOTONIC, which all processes of one machine share. */
export interface Reply {
  readonly at?: number;
  readonly firstSendAt?: number;
  readonly usableAt?: number;
  readonly sentAt?: number;
  readonly bytes?: number;
  /** What was found unequal; absent where every byte is right. */
  readonly wrong?: string;
  readonly count?: number;
  readonly times?: readonly number[];
  readonly iterations?: number;
  readonly ms?: number;
  readonly deviceUsedBytes?: number;
  readonly residentBytes?: number;
  readonly uniqueId?: Uint8Array;
  readonly environment?: Environment;
}

export type PeerMessage =
  | { readonly type: 'ready'; readonly address: HostPort }
  | { readonly type: 'not-ready'; readonly error: ErrorData }
  | { readonly type: 'reply'; readonly seq: number; readonly reply: Reply }
  | { readonly type: 'failed'; readonly seq: number; readonly error: ErrorData };
