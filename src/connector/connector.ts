/** The two halves of a KV connector. The scheduler half is pure; the worker half talks to the transfer engine. */
import type { EventRef, PagedLayer } from '../device/device.ts';
import type { ErrorData } from '../errors.ts';
import type { FirstTokens, LoadOutcome } from '../transfer/native/hand-over-api.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';
import type { Wire } from '../wire/overlap.ts';
import type { ConnectorMetadata } from './metadata.ts';

export type { LoadOutcome };

/** What a connector needs to know about a request, in any runtime. */
export interface ConnectorRequest {
  readonly requestId: EngineRequestId;
  /** Identifies its KV at both ends; unique among requests under way. */
  readonly transferId: TransferId;
  readonly numPromptTokens: number;
  /** The prompt. Where both ends give it, KV of another prompt is never taken for this one's. */
  readonly promptTokens?: Int32Array;
  /** How its KV travels, as both ends have been told; absent: frozen. `native` needs `promptTokens` and `samplingDigest`. */
  readonly wire?: Wire;
  /** Equal at both ends where they draw the prompt's first token alike: then the consumer takes the one that the producer drew. */
  readonly samplingDigest?: string;
  /** False where the request needs logits of its whole prompt, so that loaded KV would not do. */
  readonly mayLoad: boolean;
  /** Milliseconds for which the other end may still be computing the prompt. */
  readonly prefillWithinMs?: number;
}

/** One step's work, as far as it concerns a connector. */
export interface ScheduledRequest extends Omit<ConnectorRequest, 'mayLoad' | 'prefillWithinMs'> {
  /** Tokens whose KV was there before this step: cached, loaded or computed. */
  readonly numComputedTokens: number;
  /** Tokens computed in this step. */
  readonly numScheduledTokens: number;
  /** All blocks of the request, in order; in chunked prefill too. */
  readonly blockIds: readonly number[];
}

/** Scheduler side. Called in this order for each new request; pure, no I/O. */
export interface SchedulerConnector {
  /** KV of this request goes to or comes from a peer, so that its transfer id must be no other's while it is under way. */
  transfersKv(transferId: TransferId): boolean;
  /** Tokens beyond `numLocalTokens` (prefix-cache hits) whose KV will come from the peer; the request then waits outside the batch. */
  getNumNewMatchedTokens(request: ConnectorRequest, numLocalTokens: number): number;
  /** Blocks for the whole prompt are allocated; `numExternalTokens` as answered above (0 where nothing is loaded). */
  updateStateAfterAlloc(
    request: ConnectorRequest,
    blockIds: readonly number[],
    numLocalTokens: number,
    numExternalTokens: number,
  ): void;
  /** Metadata of this step, once; what it carries is not repeated in the next. */
  buildConnectorMeta(scheduled: readonly ScheduledRequest[]): ConnectorMetadata;
  /** A load ended without KV and the request will compute its prompt itself (or end). Its blocks may be gone, where they are quarantined. */
  loadFailed(requestId: EngineRequestId): void;
  /** Preempted: its blocks are gone; a save not yet emitted will be emitted when its prompt is complete again. */
  requestPreempted(requestId: EngineRequestId): void;
  /** Finished or aborted, in any state. */
  requestFinished(requestId: EngineRequestId): void;
}

/** The state of a save at the end of its step, unless all is well. */
export type SaveOutcome =
  | { readonly requestId: EngineRequestId; readonly state: 'failed'; readonly error: ErrorData }
  /** PUT_ASYNC: a pair with the peer is still being opened. `settled` never rejects; it resolves with the error where there will be none. */
  | {
      readonly requestId: EngineRequestId;
      readonly state: 'opening';
      readonly settled: Promise<ErrorData | undefined>;
    };

/**
 * Worker side, on the core thread. One step: requestFinished, startLoadKv, (waitForLayerLoad, saveKvLayer) per layer, waitForSave,
 * promptsDrawn, getFinished.
 */
export interface WorkerConnector {
  /** Starts the loads of this step in the background and remembers its saves. */
  startLoadKv(metadata: ConnectorMetadata): void;
  /**
   * For a runtime that loads within the step instead of outside the batch: resolves when `layerName` of every load started by the
   * last `startLoadKv` is in place (or has failed: `getFinished` says which).
   */
  waitForLayerLoad(layerName: string): Promise<void>;
  /** The layer's KV of this step is written (or will be when `ready` fires): sends it for every save of the step. Never blocks. */
  saveKvLayer(layerName: string, layer: PagedLayer, ready?: EventRef): void;
  /**
   * PUT: all is sent. PUT_ASYNC and GET: all is gathered, so blocks may be reused. Bounded by the transfer's deadlines; a failed send
   * is logged and counted, never thrown: the consumer's policy decides. Returns what its consumer must be told of.
   */
  waitForSave(): Promise<readonly SaveOutcome[]>;
  /** The step has run: what was drawn at the end of each prompt that it completed. Before a block of theirs is freed. */
  promptsDrawn(draws: ReadonlyMap<EngineRequestId, FirstTokens>): void;
  /** Loads that ended since the last call. */
  getFinished(): LoadOutcome[];
  /** Resolves when a load has ended that `getFinished` has not told yet, or blocks were given back: an idle core waits here. */
  readonly loadEnded: Promise<void>;
  /**
   * A prompt waits for `numBlocks` blocks: KV that is kept for a consumer and older than the time a consumer has to ask for it makes room.
   * Whether it did; else in how many milliseconds some may, or undefined where none is kept.
   */
  makeRoom(numBlocks: number): true | number | undefined;
  /**
   * The request is over: frees what is held for it; a producer's KV stays to be asked for, unless it was aborted. Before its blocks are
   * given to another request.
   */
  requestFinished(request: FinishedRequest): void;
}

/** A request that is over in every respect: no sequence lives, no load writes. */
export interface FinishedRequest {
  readonly requestId: EngineRequestId;
  readonly transferId: TransferId;
  /** Its client went away, or nobody will decode it. */
  readonly aborted: boolean;
}
