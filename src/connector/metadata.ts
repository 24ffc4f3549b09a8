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

/** What a step adds to the KV of a prompt that goes to its consumer by the native hand-over. */
export interface FillMeta {
  readonly requestId: EngineRequestId;
  readonly transferId: TransferId;
  readonly promptDigest: string;
  /** Of the parameters that its first token is drawn under. */
  readonly samplingDigest: string;
  /** Of the prompt, all of them. */
  readonly numTokens: number;
  /** Of those, how many have their KV in `blockIds` once the step has run. */
  readonly numComputed: number;
  /** From the prompt's first block on, as far as it is computed. */
  readonly blockIds: readonly number[];
}

/** KV of a prompt that is asked for by the native hand-over; the request waits outside the batch until `getFinished` names it. */
export interface WantMeta {
  readonly requestId: EngineRequestId;
  readonly transferId: TransferId;
  readonly promptDigest: string;
  readonly samplingDigest: string;
  /** Prefill instance, rank 0. */
  readonly peer: HostPort;
  /** Of the prompt, all of them. */
  readonly numTokens: number;
  /** Leading blocks of the prompt that are here already. */
  readonly skipBlocks: number;
  /** The others, in order. */
  readonly blockIds: readonly number[];
  /** The producer may still compute the prompt for so many milliseconds. */
  readonly prefillWithinMs?: number;
}

export interface ConnectorMetadata {
  readonly saves: readonly SaveMeta[];
  readonly loads: readonly LoadMeta[];
  /** Loads given up by abort since the last step, of either wire. */
  readonly cancels: readonly EngineRequestId[];
  /** Native hand-over: prompts whose blocks are gone before all of it was computed. It may begin again, in other blocks. */
  readonly lost: readonly TransferId[];
  readonly fills: readonly FillMeta[];
  readonly wants: readonly WantMeta[];
  /** Requests that were settled without the KV of their peer, rank 0. */
  readonly unwanted: readonly { readonly transferId: TransferId; readonly peer: HostPort }[];
}
