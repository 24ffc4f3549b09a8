/** What the scheduler side of the connector tells the worker side, one step at a time. Plain data. */
import type { HostPort } from '../net/address.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';

/** KV of one request to be sent with this step: its prompt is complete once the step has run. */
export interface SaveMeta {
  readonly requestId: EngineRequestId;
  /** What both ends know its KV by. */
  readonly transferId: TransferId;
  readonly promptDigest?: string;
  /** Decode instance, rank 0. */
  readonly peer: HostPort;
  /** Prompt tokens. */
  readonly numTokens: number;
  /** Every block of the prompt, cached ones too. */
  readonly blockIds: readonly number[];
}

/** KV of one request to be loaded; the request waits outside the batch until `getFinished` names it. */
export interface LoadMeta {
  readonly requestId: EngineRequestId;
  /** What both ends know its KV by. */
  readonly transferId: TransferId;
  readonly promptDigest?: string;
  /** Prefill instance, rank 0. */
  readonly peer: HostPort;
  /** Tokens whose KV is taken: prompt length - 1 - local hits. */
  readonly numTokens: number;
  readonly blockIds: readonly number[];
  /** Leading blocks of `blockIds` that the local prefix cache already has. */
  readonly skipBlocks: number;
  /** The producer may still compute the prompt for so many milliseconds. */
  readonly prefillWithinMs?: number;
}

export interface ConnectorMetadata {
  readonly saves: readonly SaveMeta[];
  readonly loads: readonly LoadMeta[];
  /** Loads given up by abort since the last step. */
  readonly cancels: readonly EngineRequestId[];
}
