/**
 * What the hand-over on the core thread (hand-over.ts) and the wire on the transfer thread (wire.ts) say to each other. Plain data:
 * structured clone. A `peer` is the `host:port` of a ROUTER, as ids name it.
 */
import type { EventRef, PagedLayer } from '../../device/device.ts';
import type { ErrorData } from '../../errors.ts';
import type { TransferId } from '../../wire/ids.ts';
import type {
  CacheShape,
  ConsumerMessage,
  HelloMessage,
  NativeTransport,
  Nonce,
  PartMessage,
  ProducerMessage,
} from './messages.ts';

/** What the transfer thread is told at its start. */
export interface NativeInit {
  readonly nonce: Nonce;
  /** The paged cache that KV is read from and written to. */
  readonly layers: readonly PagedLayer[];
  readonly shape: CacheShape;
  readonly transports: readonly NativeTransport[];
  readonly direct?: HelloMessage['direct'];
}

export type ToWire =
  /** Say hello to that peer's ROUTER; `introduced` or `lost` follows. */
  | { readonly kind: 'connect'; readonly peer: string }
  /** Ask the consumer at that address whether it will want KV of this id natively; `unwilling` follows where it says that it will not. */
  | { readonly kind: 'probe'; readonly peer: string; readonly id: TransferId }
  /** By the DEALER; where there is no connection it is one to make, and lost: it is said again anyway. */
  | { readonly kind: 'ask'; readonly peer: string; readonly message: ConsumerMessage }
  /** By the ROUTER, to who has connected. */
  | { readonly kind: 'answer'; readonly peer: string; readonly message: ProducerMessage }
  /** Our hello by the ROUTER, to who speaks to a process that is not this one. */
  | { readonly kind: 'introduce'; readonly peer: string }
  /**
   * PART, and these blocks of its layers behind it on the pair with `peer`; `written` follows once it is on its way and they may be overwritten
   * (`leaving`: and `sent` once it has left). They are there when `ready` has fired, an event of that step; `gathered` says that it is needed no more.
   */
  | {
      readonly kind: 'write';
      readonly peer: string;
      readonly launch: number;
      readonly part: Omit<PartMessage, 'part'>;
      readonly blocks: Int32Array;
      readonly ready?: { readonly event: EventRef; readonly step: number };
    }
  /** What `part` announced, into these blocks; absent: into scratch memory. `received` follows. */
  | {
      readonly kind: 'receive';
      readonly peer: string;
      readonly receipt: number;
      readonly part: PartMessage;
      readonly blocks?: Int32Array;
    }
  /** The ends have lost step, or can do nothing with it: end the connection and its pair. */
  | { readonly kind: 'reset'; readonly peer: string; readonly why: string };

export type FromWire =
  /** `to`: we have connected to it, and may ask. `from`: it has connected to us, and is answered. */
  | {
      readonly kind: 'introduced';
      readonly way: 'to' | 'from';
      readonly peer: string;
      readonly hello: HelloMessage;
    }
  | { readonly kind: 'asked'; readonly peer: string; readonly message: ConsumerMessage }
  | { readonly kind: 'answered'; readonly peer: string; readonly message: ProducerMessage }
  /** The connection is over, whichever process lives. `from`: an answer to it could not be delivered. */
  | {
      readonly kind: 'lost';
      readonly way: 'to' | 'from';
      readonly peer: string;
      readonly error: ErrorData;
    }
  /** That consumer does not speak this wire, or not with us. */
  | {
      readonly kind: 'unwilling';
      readonly peer: string;
      readonly id: TransferId;
      readonly error: ErrorData;
    }
  | { readonly kind: 'gathered'; readonly step: number }
  | {
      readonly kind: 'written';
      readonly launch: number;
      readonly error?: ErrorData;
      readonly leaving?: true;
    }
  /** A part that was told of as `leaving` is sent, or will not be. */
  | { readonly kind: 'sent' }
  | { readonly kind: 'received'; readonly receipt: number; readonly error?: ErrorData };
