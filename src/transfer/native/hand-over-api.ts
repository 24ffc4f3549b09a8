/**
 * The hand-over between ours as the connector holds it, on the core thread (docs/protocol.md, "Native hand-over"). One worker may want KV
 * and give it; a request's KV goes one way. Nothing here blocks or rejects: failures are outcomes.
 *
 *   consumer   want --> (loadEnded: all KV is there, or it will not come)      cancel, unwanted: it is not needed
 *   producer   begin --> progress, layer ..., stepEnded (each step) --> finish | fail
 */
import type { EventRef } from '../../device/device.ts';
import type { ErrorCode, ErrorData } from '../../errors.ts';
import type { EngineRequestId, TransferId } from '../../wire/ids.ts';
import type { TokenLogprob } from '../../wire/token-logprob.ts';
import type { Grants } from './grants.ts';
import type { Fallback } from './hello.ts';
import type { NativeTransport } from './messages.ts';
import type { Wants } from './wants.ts';

/** "Fill these blocks of mine with the KV of this prompt." */
export interface WantRequest {
  readonly requestId: EngineRequestId;
  readonly transferId: TransferId;
  /** `host:port` of the producer of the same rank. */
  readonly peer: string;
  /** kv/block-hash.ts */
  readonly promptDigest: string;
  /** scheduler/sampling-digest.ts */
  readonly samplingDigest: string;
  /** Of the prompt, all of them. */
  readonly tokens: number;
  /** Leading blocks that are here already. At least one block is wanted. */
  readonly skip: number;
  /** The rest of the prompt's blocks, in order: ceil(tokens / block size) - skip. They belong to one table alone and are in no prefix cache. */
  readonly blocks: readonly number[];
  /** The load ends after so many milliseconds, by KV_LOAD_TIMEOUT. */
  readonly withinMs: number;
  /** The producer may still compute the prompt for so many milliseconds: added to `withinMs`, until `prefilled`. */
  readonly prefillWithinMs?: number;
}

/** What was drawn at the prompt's last position: one token for each completion that was drawn, at most one today. */
export interface FirstTokens {
  readonly tokens: readonly number[];
  /** One for each token, where asked for. */
  readonly logprobs?: readonly TokenLogprob[];
}

/** What a producer drew, and under which parameters. */
export interface Drawn extends FirstTokens {
  /** scheduler/sampling-digest.ts */
  readonly samplingDigest: string;
}

/** By either wire: exactly one for each `want`, and for each load that was begun. */
export type LoadOutcome =
  | {
      readonly requestId: EngineRequestId;
      readonly ok: true;
      readonly bytes: number;
      readonly milliseconds: number;
      /** Drawn under this end's parameters. Absent: all KV is there, and the last position is computed here. */
      readonly draw?: FirstTokens;
    }
  | {
      readonly requestId: EngineRequestId;
      readonly ok: false;
      readonly error: ErrorData;
      /**
       * A write into the blocks may still come: whoever goes on lets go of them now and takes others. They are free once the hand-over
       * has retracted them.
       */
      readonly quarantined: boolean;
    };

/** The block manager and the sequences behind it, as the hand-over uses them; each is called on the core thread, also while a step runs. */
export interface HandOverBooks {
  /** `BlockManager.hold`, `unhold`: source blocks of writes that have not landed. */
  hold(blocks: readonly number[]): void;
  unhold(blocks: readonly number[]): void;
  /** `BlockManager.expose`, `retract`: blocks of wants that another process may write to. */
  expose(key: string, blocks: readonly number[]): void;
  retract(key: string): void;
  /** Within `finish`: the prompt's blocks stay under a lease once its sequence has ended (`BlockManager.lease`, with this id as the key). */
  lease(transferId: TransferId): void;
  /** The lease of `transferId` is over, or will not be needed; idempotent (`BlockManager.endLease`). */
  endLease(transferId: TransferId): void;
}

/**
 * Stages of a prompt on its way, told as they come. Consumer: its KV is `wanted`, `asked` for by WANT, `flagged` by the GPU that wrote it,
 * `loaded`. Producer: a WANT is `bound` to it, the `launched` last layer has `landed`.
 */
export type HandOverStage = 'wanted' | 'asked' | 'flagged' | 'loaded' | 'bound' | 'launched' | 'landed';

/** With `loaded` and `landed`: how KV came or went, how much of it, and with whom (`host:port` of its ROUTER). */
export interface MovedKv {
  readonly transport: NativeTransport;
  readonly kv_bytes: number;
  readonly kv_from?: string;
  readonly kv_to?: string;
}

/** Who uses a hand-over. */
export interface HandOverUser {
  readonly books: HandOverBooks;
  /** A want is over. May come within `want` and `cancel`, and while a step is under way; the blocks are retracted before, where they can be. */
  loadEnded(outcome: LoadOutcome): void;
  /** Blocks were given back by `unhold`, `retract` or `endLease` outside of a call of the user's: a prompt that waits for room may go on. */
  freed(): void;
}

/** A connection to a producer. */
export interface ConnectionState {
  readonly peer: string;
  /** How its bytes come; undefined while that is being found out. */
  readonly transport: NativeTransport | undefined;
  /** Between GPUs: why not by `direct`. */
  readonly fallback?: Fallback;
}

/** A cache that one process writes into and another one owns, both on this host. */
export interface MappingState {
  /** The other process: `host:port` of its ROUTER. */
  readonly peer: string;
  /** `theirs`: its cache is mapped here. `ours`: it has ours mapped. */
  readonly cache: 'ours' | 'theirs';
  /** Of the cache. */
  readonly bytes: number;
  /** Of `theirs`: how fast writes get there. */
  readonly path?: PathState;
}

/** What the self-test of a mapping found (self-test.ts). */
export type PathState =
  | { readonly state: 'waiting' }
  /** Why not: the GPU was never idle, or the peer offers nowhere to write. */
  | { readonly state: 'not measured'; readonly why: string }
  | {
      readonly state: 'measured';
      readonly bytesPerSecond: number;
      /** From the launch of a small write to its end as this process sees it. */
      readonly latencySeconds: number;
      /** What a write of that size reaches over that link; absent where nothing is known of the link. */
      readonly expectedBytesPerSecond?: number;
      /** `nvlink`, `pcie`, `same GPU`, `unknown`. */
      readonly link: string;
    };

/** As `/debug/state` shows it. */
export interface HandOverState {
  /** Connections to producers of now. */
  readonly producers: readonly ConnectionState[];
  readonly mappings: readonly MappingState[];
  /** Blocks that a producer that was given up on may still write to. */
  readonly quarantine: readonly { readonly peer: string; readonly blocks: number }[];
  /** Not asked for yet: their producers have not said hello. */
  readonly connecting: number;
  readonly wants: ReturnType<Wants['stats']>;
  readonly grants: ReturnType<Grants['stats']>;
}

export interface HandOverApi {
  /** Once, before anything else: who is told. */
  serve(user: HandOverUser): void;

  /** Asks for KV. Exposes `blocks` now or later, and retracts them. */
  want(request: WantRequest): void;
  /** The request does not want its KV any more. Its outcome comes at once, REQUEST_ABORTED, unless it has come. */
  cancel(requestId: EngineRequestId): void;
  /** The request was settled without a `want` (a local hit, an echo): its KV need not be kept by `peer`. */
  unwanted(transferId: TransferId, peer: string): void;
  /** The producer is done with the prompt: a want that was told `prefillWithinMs` has `withinMs` from now. */
  prefilled(transferId: TransferId): void;
  /** The producer could not compute or send it, as it has told the proxy: its want fails at once, with `reason` inside. */
  sendFailed(transferId: TransferId, reason: ErrorData): void;

  /** A request that computes its prompt here for a native peer: when it is scheduled first, before its `progress`. Again after `fail` alone. */
  begin(request: {
    readonly transferId: TransferId;
    readonly promptDigest: string;
    readonly tokens: number;
  }): void;
  /**
   * At the start of a step, before its first layer: after it the KV of the first `computed` tokens of the prompt lies in `blocks`, all
   * blocks from the prompt's first on. KV that needs no step (prefix cache) is told by the step that goes on behind it. After a preemption
   * it may begin again, in other blocks.
   */
  progress(transferId: TransferId, computed: number, blocks: readonly number[]): void;
  /** Layer `index` has written its KV of this step, or will have when `ready` fires (absent: it has). In order, from 0. */
  layer(index: number, ready?: EventRef): void;
  /**
   * The executor is done with the step, well or not, and what it did not tell by `layer` will not come. Before `finish` and `fail` of its
   * requests. Resolves when no event of the step is needed any more; bounded, never rejects. Without `progress` it costs nothing.
   */
  stepEnded(): Promise<void>;
  /**
   * The whole prompt is computed and its first token drawn. `books.lease` is called within, where the KV must outlive the sequence. Throws
   * REQUEST_INVALID for what is no token id.
   */
  finish(transferId: TransferId, drawn: Drawn): void;
  /** For how many ms the consumer that `transferId` names has waited for another prompt, which has not begun here; 0 where for none. */
  consumerWaits(transferId: TransferId): number;
  /**
   * Its KV will not come (abort, error), or its lease has had to make room. Unknown ids mean nothing. Writes under way keep their blocks by
   * themselves.
   */
  fail(transferId: TransferId, code: ErrorCode, why: string): void;
}
