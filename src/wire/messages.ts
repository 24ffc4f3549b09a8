/**
 * The messages of the control plane as the rest of the program sees them; `codec.ts` turns them into bytes and back. A *native*
 * peer is a pd-worker; a *frozen* one speaks the wire of vLLM and nothing else. The field `native` of a message travels as `pd`, which only
 * native peers send and read.
 */
import type { ErrorCode } from '../errors.ts';
import type { Dtype } from './dtype.ts';
import type { Fingerprint } from './fingerprint.ts';
import type { TensorId } from './ids.ts';

/** Version of everything that travels in `pd`. A peer of a higher one still understands this one. */
export const PD_VERSION = 1;

export const SEND_TYPES = ['PUT', 'PUT_ASYNC', 'GET'] as const;
/**
 * PUT: the producer sends, and a save waits until everything is sent. PUT_ASYNC: the producer sends in the background. GET: the producer
 * keeps the KV, the consumer asks for it. Both ends must agree.
 */
export type SendType = (typeof SEND_TYPES)[number];

export const UNIQUE_ID_BYTES = 128;

declare const brand: unique symbol;
/** Exactly 128 bytes: NCCL's bootstrap address, or the host transport's data address and token. */
export type UniqueId = Uint8Array & { readonly [brand]: 'UniqueId' };

/** What two native peers exchange at NEW. */
export interface PeerHello {
  readonly version: number;
  /** Unknown names are kept and ignored. */
  readonly features: readonly string[];
  readonly sendType: SendType;
  /** Absent for an engine that exchanges tensors of any model. */
  readonly fingerprint?: Fingerprint;
}

/** "Join a communicator with me; I am rank 0." */
export interface NewMessage {
  readonly cmd: 'NEW';
  readonly unique_id: UniqueId;
  readonly native?: PeerHello;
}

/** "I want to send you this tensor." */
export interface PutMessage {
  readonly cmd: 'PUT';
  readonly tensor_id: TensorId;
  readonly shape: readonly number[];
  readonly dtype: Dtype;
  /** Only to a peer known to be native: it may then answer `2`. */
  readonly native?: Pick<TensorForm, 'promptDigest'>;
}

/** "Send me this tensor." */
export interface GetMessage {
  readonly cmd: 'GET';
  readonly tensor_id: TensorId;
}

/** The shape and type of a tensor on the wire. */
export interface TensorForm {
  readonly shape: readonly number[];
  readonly dtype: Dtype;
  /** Between native peers: the digest of the prompt that this is KV of, if the sender knows it. */
  readonly promptDigest?: string | undefined;
}

export type WireMessage = NewMessage | PutMessage | GetMessage;

/** From rank 0 of an instance to the proxy, as a heartbeat. `P` is prefill, `D` decode. */
export interface PingMessage {
  readonly type: 'P' | 'D';
  readonly http_address: string;
  readonly zmq_address: string;
  readonly native?: PingHello;
}

export interface PingHello {
  readonly version: number;
  /** `Fingerprint.digest`: the proxy pairs only equal ones. */
  readonly digest: string;
  /** `Fingerprint.model`, for people. */
  readonly model: string;
  /** How KV moves: instances that differ in GET or PUT are not paired. Absent in pings of older workers. */
  readonly sendType?: SendType;
  /** Unknown names are ignored. Absent in pings of older workers. */
  readonly features?: readonly string[];
  /** Absent in pings of older workers. */
  readonly load?: WorkerLoad;
  /** Absent if it publishes none. */
  readonly events?: KvEventPorts;
  /** Digest of tokenizer, chat template and ends of text: equal ones make the same ids of a request. Absent in pings of older workers. */
  readonly tokenizer?: string;
  /** When the worker started, ms since 1970: of another process it is another. Absent in pings of older workers. */
  readonly started?: number;
}

/** The ports on which a worker publishes what it has cached (kv-events.ts), on the host of its `zmq_address`. */
export interface KvEventPorts {
  readonly publish: number;
  readonly replay: number;
  readonly snapshot: number;
}

/** The load of a worker when it sent its ping. */
export interface WorkerLoad {
  /** Requests in the batch. */
  readonly running: number;
  /** Requests outside the batch, including those whose KV is being loaded. */
  readonly waiting: number;
  /** Blocks of its KV cache that requests hold, and blocks in all. */
  readonly kvUsed: number;
  readonly kvBlocks: number;
  /** Prompt tokens that are still to be computed here: neither cached nor coming from a peer. */
  readonly queuedTokens: number;
}

/** The answers of a listener. */
export type Answer =
  /** PUT: send now. */
  | { readonly kind: 'send' }
  /** PUT: no memory for it. */
  | { readonly kind: 'no-room' }
  /** PUT, between native peers: there is no pair, send NEW first. */
  | { readonly kind: 'no-pair' }
  /** GET: the data follows on the pair, in the order of these answers. */
  | ({ readonly kind: 'get'; readonly ret: 0 } & TensorForm)
  /** GET: not here. */
  | {
      readonly kind: 'get';
      readonly ret: 1;
      /** Between native peers: it was here and has been dropped, so asking again is pointless. */
      readonly gone?: boolean;
      /** Between native peers: tensors that are kept under another id of the same request. */
      readonly near?: readonly string[];
    }
  /** NEW, between native peers. With `refused` no pair is opened. */
  | {
      readonly kind: 'hello';
      readonly hello: PeerHello;
      readonly refused?: { readonly code: ErrorCode; readonly message: string };
    };
