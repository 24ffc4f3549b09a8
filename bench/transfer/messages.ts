/** What the benchmark sends its peers (each a process with one engine on one device), and their replies. Plain data over the IPC channel. */

import type { TransferTimeouts } from '../../src/config/transfer-options.ts';
import type { ErrorData } from '../../src/errors.ts';
import type { HostPort } from '../../src/net/address.ts';
import type { LogLevel } from '../../src/observability/log-options.ts';
import type { Timeline } from '../../src/observability/timelines.ts';
import type { NativeTransport } from '../../src/transfer/native/messages.ts';
import type { TransferId } from '../../src/wire/ids.ts';
import type { SendType } from '../../src/wire/messages.ts';
import type { Environment } from '../measure/machine.ts';
import type { KvShape } from './shape.ts';

/** The one argument that a peer starts with, as JSON. */
export interface PeerSetup {
  readonly device: string;
  readonly shape: KvShape;
  /** Bytes of the area that tensors are sent from, or that holds the paged caches. */
  readonly areaBytes: number;
  /** The most bytes that are filled and checked at once: a whole layer's cache, or the largest flat tensor. */
  readonly largestBytes: number;
  /** Absent for a peer without an engine: ceilings, memory readings. */
  readonly engine?: EngineSetup;
  /** Instead of `engine`. */
  readonly end?: EndSetup;
  readonly ncclNumChannels: number;
  /** Loads the compute loop's kernels, which is only possible before the first pair opens. */
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

/** One end of the product's hand-over. */
export interface EndSetup {
  readonly role: 'producer' | 'consumer';
  readonly transport: NativeTransport;
  /** Of its paged cache. */
  readonly blocks: number;
  readonly kvBufferSize: number;
  readonly timeouts: TransferTimeouts;
  readonly logLevel: LogLevel;
}

/** The KV of one request: all layers, paged blocks to paged blocks, by two random block tables; gathered and scattered. */
export interface PagedJob {
  readonly kind: 'paged';
  readonly id: string;
  readonly tokens: number;
  /** Pattern stream `stream + i` fills layer `i`; the streams after them fill what the target holds before. */
  readonly stream: number;
  /** Chooses the block tables. */
  readonly seed: number;
  /** Which of several caches of the target it goes to, so that a series of requests can be checked afterwards. */
  readonly slot: number;
}

/** `count` dense tensors; no gather, no scatter. */
export interface FlatJob {
  readonly kind: 'flat';
  readonly id: string;
  readonly count: number;
  readonly bytes: number;
  /** Pattern stream `stream + i` fills tensor `i`. */
  readonly stream: number;
  /** Tensors are sent and requested last first. */
  readonly order?: 'reverse';
}

/** What is moved under one id. */
export type Job = PagedJob | FlatJob;

export type Command =
  /** Writes the pattern: at the source what is sent, at a paged target what must be overwritten or left unchanged. */
  | { readonly do: 'fill'; readonly job: Job; readonly side: 'source' | 'target' }
  /** Starts a load or receives; replies once the transfer thread has them. */
  | { readonly do: 'arm'; readonly job: Job; readonly peer: HostPort; readonly timeoutMs?: number }
  /** Replies when all of the job is usable here. */
  | { readonly do: 'wait'; readonly id: string }
  /** Sends all of the job; replies when everything has been sent. */
  | { readonly do: 'send'; readonly job: Job; readonly peer: HostPort }
  /** Compares every byte that arrived. */
  | { readonly do: 'check'; readonly job: Job }
  | { readonly do: 'finish'; readonly id: string }
  /** Sends request after request, `window` at a time, until `stop`; replies with their number. Not checked. */
  | { readonly do: 'pump'; readonly job: PagedJob; readonly peer: HostPort; readonly window: number }
  /** Loads what `pump` sends, until `stop` says how many there were. */
  | { readonly do: 'drain'; readonly job: PagedJob; readonly peer: HostPort; readonly window: number }
  | { readonly do: 'stop'; readonly count?: number }
  /** An end: fills its whole cache, layer `i` with pattern stream `stream + i`; other streams at the two ends. */
  | { readonly do: 'fill-cache'; readonly stream: number }
  /** A consumer asks for the KV of these prompts, all in one step; replies as soon as it has. */
  | {
      readonly do: 'want';
      readonly ids: readonly TransferId[];
      readonly tokens: number;
      readonly peer: HostPort;
    }
  /** A producer: replies once `count` WANTs wait for their prompts. */
  | { readonly do: 'asked'; readonly count: number }
  /** Replies when it has all of them. */
  | { readonly do: 'loaded'; readonly ids: readonly TransferId[] }
  /**
   * A producer computes these prompts in one step. `compute`: each layer behind an iteration of the loop, as in a prefill; else all
   * layers are there at once. `abandon`: nobody will ask for them.
   */
  | {
      readonly do: 'prefill';
      readonly ids: readonly TransferId[];
      readonly tokens: number;
      readonly compute: boolean;
      readonly abandon: boolean;
    }
  /** What an end has stamped. */
  | { readonly do: 'timelines' }
  /** A consumer: blocks `target` must hold what blocks `source` of the producer do, which was filled with `stream`. */
  | {
      readonly do: 'check-cache';
      readonly stream: number;
      readonly source: readonly number[];
      readonly target: readonly number[];
    }
  /** Runs the compute loop for `ms`. */
  | { readonly do: 'compute'; readonly loop: ComputeLoop; readonly ms: number }
  /** Keeps the GPU busy for about `ms`; replies once the kernels are enqueued. */
  | { readonly do: 'occupy'; readonly ms: number }
  | { readonly do: 'memory' }
  /** The raw transport, without an engine: the ceiling. Rank 0 creates the id and sends, rank 1 receives. */
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

/** `matmul`: tensor-core products in registers, compute-bound. `memory`: paged copies, memory-bound. */
export const COMPUTE_LOOPS = ['matmul', 'memory'] as const;
export type ComputeLoop = (typeof COMPUTE_LOOPS)[number];

/** All times are `monotonicMs()`, which all processes of a machine share. */
/** Of the write that set a slot's flag, milliseconds: on the GPU's clock, and when this end's core thread saw it. */
export interface FlagTimes {
  readonly began: number;
  readonly ended: number;
  readonly seen: number;
}

export interface Reply {
  readonly at?: number;
  readonly firstSendAt?: number;
  readonly usableAt?: number;
  readonly sentAt?: number;
  readonly bytes?: number;
  /** The first difference; absent if every byte is right. */
  readonly wrong?: string;
  readonly count?: number;
  readonly times?: readonly number[];
  readonly iterations?: number;
  readonly ms?: number;
  readonly deviceUsedBytes?: number;
  readonly residentBytes?: number;
  readonly uniqueId?: Uint8Array;
  readonly environment?: Environment;
  readonly timelines?: readonly Timeline[];
  /** Of each request. */
  readonly blocks?: readonly (readonly number[])[];
  /** The same, by `direct`. */
  readonly flags?: readonly FlagTimes[];
}

export type PeerMessage =
  | { readonly type: 'ready'; readonly address: HostPort }
  | { readonly type: 'not-ready'; readonly error: ErrorData }
  | { readonly type: 'reply'; readonly seq: number; readonly reply: Reply }
  | { readonly type: 'failed'; readonly seq: number; readonly error: ErrorData };
