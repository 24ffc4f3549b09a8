/** What the two ledgers (grants.ts, wants.ts) tell their drivers to do. Pure data. */
import type { ErrorData } from '../../errors.ts';
import type { TransferId } from '../../wire/ids.ts';
import type {
  ConsumerMessage,
  DoneMessage,
  NativeTransport,
  Nonce,
  PartMessage,
  ProducerMessage,
  Ticket,
} from './messages.ts';

/** What the producer drew at the prompt's last position. */
export type Draw = Pick<DoneMessage, 'drawn' | 'logprobs' | 'samplingDigest'>;

/** One WANT, for a driver that keeps something for each (its block table on the device). */
export interface WantRef {
  readonly peer: string;
  /** Of the consumer's process. */
  readonly nonce: Nonce;
  readonly seq: number;
}

export type GrantAction =
  /** `slot`: an end may go through the page instead, or as well. */
  | {
      readonly kind: 'send';
      readonly peer: string;
      readonly message: ProducerMessage;
      readonly slot?: number;
    }
  /** The peer speaks to a process that is not this one, or has not introduced itself: send it our hello. */
  | { readonly kind: 'introduce'; readonly peer: string }
  | ({ readonly kind: 'bound'; readonly id: TransferId; readonly transport: NativeTransport } & WantRef)
  /**
   * Hold the source blocks, and write each, all layers, to the target at the same place. `place`: of the first of them in the WANT's
   * list. The KV is there in the order of the compute stream, so a write of a layer waits for that layer's event.
   */
  | ({
      readonly kind: 'write';
      readonly launch: number;
      readonly id: TransferId;
      readonly ticket: Ticket;
      readonly slot?: number;
      readonly transport: NativeTransport;
      readonly place: number;
      readonly sources: readonly number[];
      readonly targets: readonly number[];
      /** No other write of this WANT follows. */
      readonly last: boolean;
    } & WantRef)
  | { readonly kind: 'unhold'; readonly launch: number; readonly sources: readonly number[] }
  /** Nothing is kept for this WANT any more but its end. */
  | ({ readonly kind: 'ended' } & WantRef)
  /** Not all of it has been handed over, or nobody has asked yet: lease the blocks of the prompt. */
  | { readonly kind: 'lease'; readonly id: TransferId }
  | { readonly kind: 'release'; readonly id: TransferId }
  /** A process is gone, or another has its place, and nothing of ours writes to its memory: it may be unmapped. */
  | { readonly kind: 'drained'; readonly peer: string; readonly nonce: Nonce };

export interface Ask {
  /** Rank's address of the producer. */
  readonly peer: string;
  readonly id: TransferId;
  /** Whose blocks they are; comes back with what becomes of them. */
  readonly owner: string;
  readonly promptDigest: string;
  readonly samplingDigest: string;
  /** Of the prompt; and leading blocks that are here already. */
  readonly tokens: number;
  readonly skip: number;
  readonly blocks: readonly number[];
  readonly transport: NativeTransport;
  readonly withinMs: number;
}

export type WantAction =
  | { readonly kind: 'send'; readonly peer: string; readonly message: ConsumerMessage }
  /** `BlockManager.expose`, before anything is sent. */
  | { readonly kind: 'expose'; readonly seq: number; readonly blocks: readonly number[] }
  | { readonly kind: 'retract'; readonly seq: number }
  /** The grant word of a slot in the page shared with that process; seq 0: nobody writes. */
  | {
      readonly kind: 'grant';
      readonly peer: string;
      readonly nonce: Nonce;
      readonly slot: number;
      readonly seq: number;
    }
  /** All KV is there. Without `draw` the last position is computed here. Comes after `retract`. */
  | {
      readonly kind: 'loaded';
      readonly seq: number;
      readonly owner: string;
      readonly draw?: Draw;
    }
  /** `quarantined`: the owner lets go of these blocks now, and takes others if it goes on. */
  | {
      readonly kind: 'failed';
      readonly seq: number;
      readonly owner: string;
      readonly error: ErrorData;
      readonly quarantined: boolean;
    }
  /** Its connection was lost, perhaps before its producer heard of it: it may be asked for once more. Comes after `retract`. */
  | { readonly kind: 'again'; readonly seq: number; readonly owner: string; readonly error: ErrorData }
  /** Receive what PART announced: into these blocks, or into scratch memory. */
  | {
      readonly kind: 'receive';
      readonly peer: string;
      readonly receipt: number;
      readonly part: PartMessage;
      readonly into: readonly number[] | 'scratch';
    }
  /** The ends have lost step on the pair: end it. */
  | { readonly kind: 'reset-pair'; readonly peer: string };
