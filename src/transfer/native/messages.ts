/**
 * What two workers of ours say to hand KV over (docs/protocol.md, "Native hand-over"); `codec.ts` makes bytes of it. Pure data.
 *
 *   consumer's DEALER to the producer's ROUTER   HELLO, WANT, DROP, ACK
 *   back on the same socket                      HELLO, PAIR, HELD, PART, DONE, FAIL, DROPPED
 *
 * HELLO and PAIR are the connection's (wire.ts); the ledgers (wants.ts, grants.ts) know the others alone.
 *
 * On one connection messages come in order or not at all. What is lost with a connection is said again: a consumer repeats WANT and DROP
 * until it hears an end (DONE, FAIL, DROPPED), a producer repeats an end until it hears ACK.
 */
import type { ErrorCode } from '../../errors.ts';
import type { LayoutFamily } from '../../kv/layout.ts';
import type { TransferId } from '../../wire/ids.ts';
import type { PeerHello, UniqueId } from '../../wire/messages.ts';
import type { TokenLogprob } from '../../wire/token-logprob.ts';

declare const brand: unique symbol;
/** A process, from its start to its end: 16 random bytes, as 32 hex digits. */
export type Nonce = string & { readonly [brand]: 'Nonce' };
/** What the answers to one WANT repeat: 16 random bytes, as 32 hex digits. */
export type Ticket = string & { readonly [brand]: 'Ticket' };

/** How the bytes travel. */
export const TRANSPORTS = ['direct', 'nccl', 'host'] as const;
export type NativeTransport = (typeof TRANSPORTS)[number];

/** A paged cache, as far as both ends must agree on it, and how many blocks it has. */
export interface CacheShape {
  /** May differ between ends. */
  readonly blocks: number;
  /** Tokens of a block. */
  readonly blockSize: number;
  readonly layers: number;
  /** Of one block of one layer. */
  readonly blockBytes: number;
  readonly family: LayoutFamily;
}

/** Why KV does not come. */
export interface Failure {
  readonly code: ErrorCode;
  readonly message: string;
}

/** "This is who speaks here." First of each connection, and its answer; with `refused` the two do not exchange KV. */
export interface HelloMessage {
  readonly cmd: 'HELLO';
  readonly from: Nonce;
  readonly hello: PeerHello;
  readonly cache: CacheShape;
  /** What this end can and may use. */
  readonly transports: readonly NativeTransport[];
  /** Where it meets writers of its own host: the host's boot id and the path of a Unix socket. */
  readonly direct?: { readonly bootId: string; readonly path: string };
  readonly refused?: Failure;
  /**
   * "Who speaks there?": answered with HELLO, and nothing comes of it. The id whose KV this end hands over natively, of which the other end
   * has said nothing; PROBE_ONLY where only the answer matters.
   */
  readonly probe?: string;
}

/** Stands in `probe` for no id. */
export const PROBE_ONLY = '-';

/** "Join a pair with me, I am rank 0": of a producer, before the first PART of a connection. */
export interface PairMessage extends Addressed {
  readonly cmd: 'PAIR';
  readonly uniqueId: UniqueId;
}

/** In every other message: the processes that send it and that it is for. */
interface Addressed {
  readonly from: Nonce;
  readonly to: Nonce;
}

/** Of one WANT. `seq`: 1 and up, new for each WANT of a consumer's process to a producer's. */
interface OfWant extends Addressed {
  readonly seq: number;
  readonly ticket: Ticket;
}

/** In what a consumer says: every WANT below this seq is over, and its producer may forget it. */
interface Floored {
  readonly floor: number;
}

/** "Fill these blocks of mine with the KV of this prompt." */
export interface WantMessage extends OfWant, Floored {
  readonly cmd: 'WANT';
  readonly id: TransferId;
  /** Of the prompt's token ids (kv/block-hash.ts). */
  readonly promptDigest: string;
  /** Tokens of the prompt, all of them. */
  readonly tokens: number;
  /** Leading blocks that the consumer has already. */
  readonly skip: number;
  /** Block numbers of the consumer's cache for the rest of the prompt, in its order: ceil(tokens / block size) - skip. */
  readonly blocks: readonly number[];
  /** Of the page that both map: its grant word and flag. Absent where there is no page. */
  readonly slot?: number;
  /** scheduler/sampling-digest.ts */
  readonly samplingDigest: string;
  readonly transport: NativeTransport;
}

/** "I have given this up": a want, or where there is none, KV of an id that nobody will ask for. The latter has no answer. */
export interface DropMessage extends Addressed, Floored {
  readonly cmd: 'DROP';
  readonly id: TransferId;
  readonly want?: { readonly seq: number; readonly ticket: Ticket };
}

/** "I know the end of this WANT." */
export interface AckMessage extends OfWant, Floored {
  readonly cmd: 'ACK';
}

export const HELD_STATES = ['unbound', 'bound', 'writing', 'ending'] as const;
/** `unbound`: no request of that id yet. `bound`: nothing computed yet. `ending`: an end is decided, writes are still to land. */
export type HeldState = (typeof HELD_STATES)[number];

/** "I know of it, and it is not over": to a WANT or DROP that is repeated, or that cannot be ended yet. */
export interface HeldMessage extends OfWant {
  readonly cmd: 'HELD';
  readonly state: HeldState;
}

/** "These bytes follow on the pair." What was announced so is always sent and always received. */
export interface PartMessage extends OfWant {
  readonly cmd: 'PART';
  /** 1, 2, 3 ... on one pair: a gap means that the ends have lost step, and the pair ends. */
  readonly part: number;
  /** First layer, and how many. */
  readonly layer: number;
  readonly layers: number;
  /** First place in the WANT's list of blocks, and how many. */
  readonly block: number;
  readonly blocks: number;
}

/** "All of it is written, and nothing will be any more." */
export interface DoneMessage extends OfWant {
  readonly cmd: 'DONE';
  /** The first token of each completion that was drawn; may be none. */
  readonly drawn: readonly number[];
  /** One per token of `drawn`, where asked for. */
  readonly logprobs?: readonly TokenLogprob[];
  /** Of the parameters that `drawn` was drawn under. */
  readonly samplingDigest: string;
  /** Blocks that the WANT named, and different ones of them that were written. */
  readonly promised: number;
  readonly written: number;
}

/** "It will not come, and nothing will be written any more." */
export interface FailMessage extends OfWant, Failure {
  readonly cmd: 'FAIL';
}

/** "You gave it up, and nothing will be written any more." */
export interface DroppedMessage extends OfWant {
  readonly cmd: 'DROPPED';
}

export type ConsumerMessage = WantMessage | DropMessage | AckMessage;
export type EndMessage = DoneMessage | FailMessage | DroppedMessage;
export type ProducerMessage = HeldMessage | PartMessage | EndMessage;
/** What a ROUTER hears. */
export type AskedMessage = HelloMessage | ConsumerMessage;
/** What a DEALER hears. */
export type AnsweredMessage = HelloMessage | PairMessage | ProducerMessage;
export type NativeMessage = AskedMessage | AnsweredMessage;

/** What every answer to a WANT repeats. */
export function answerTo({ from, to, seq, ticket }: WantMessage): OfWant {
  return { from: to, to: from, seq, ticket };
}
