/** What the scheduler side of the connector tells the worker side, one step at a time. Plain data. */
import type { HostPort } from '../net/address.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';

interface RequestKv {
  readonly requestId: EngineRequestId;
  /** Identifies its KV at both ends. */
  readonly transferId: TransferId;
}

/** What the native hand-over compares. */
interface NativeKv extends RequestKv {
  readonly promptDigest: string;
  /** Of the parameters that the prompt's first token is drawn under. */
  readonly samplingDigest: string;
  /** Of the prompt, all of them. */
  readonly numTokens: number;
}

/** KV of one request to be sent with this step: its prompt is complete once the step has run. */
export interface SaveMeta extends RequestKv {
  readonly promptDigest?: string;
  /** Decode instance, rank 0. */
  readonly peer: HostPort;
  /** Prompt tokens. */
  readonly numTokens: number;
  /** Every block of the prompt, cached ones too. */
  readonly blockIds: readonly number[];
}

/** KV of one request to be loaded; the request waits outside the batch until `getFinished` names it. */
export interface LoadMeta extends RequestKv {
  readonly promptDigest?: string;
  /** Prefill instance, rank 0. */
  readonly peer: HostPort;
  /** Tokens whose KV is taken: prompt length - 1 - local hits. */
  readonly numTokens: number;
  readonly blockIds: readonly number[];
  /** Leading blocks of `blockIds` that the local prefix cache already has. */
  readonly skipBlocks: number;
  /** Milliseconds for which the producer may still be computing the prompt. */
  readonly prefillWithinMs?: number;
}

/** What a step adds to the KV of a prompt that goes to its consumer by the native hand-over. */
export interface FillMeta extends NativeKv {
  /** Tokens of the prompt that have their KV in `blockIds` once the step has run. */
  readonly numComputed: number;
  /** From the prompt's first block on, as far as it is computed. */
  readonly blockIds: readonly number[];
}

/** KV of a prompt that is asked for by the native hand-over; the request waits outside the batch until `getFinished` names it. */
export interface WantMeta extends NativeKv {
  /** Prefill instance, rank 0. */
  readonly peer: HostPort;
  /** Leading blocks of the prompt that are here already. */
  readonly skipBlocks: number;
  /** The others, in order. */
  readonly blockIds: readonly number[];
  /** Milliseconds for which the producer may still be computing the prompt. */
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
