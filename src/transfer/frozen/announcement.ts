/** What is announced to a peer on a pair of ours, and answered by it: a PUT or a GET, by itself or in a bundle. */
import type { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import type { TensorId } from '../../wire/ids.ts';
import type { Answer, WireMessage } from '../../wire/messages.ts';

/** What an answer means to the announcement it answers. */
export type Reaction =
  /** The answer belongs to another kind of announcement. */
  | 'unexpected'
  | {
      /** Data is under way on the pair until this resolves. It never rejects. */
      readonly moved?: Promise<void>;
      /** To be announced anew. */
      readonly again?: readonly Announcement[];
    };

/** One message and its answer. */
export interface Unit {
  readonly parts: readonly Announcement[];
  /** `ours`: the peer is known to be ours, so that our fields may go along. */
  message(ours: boolean, seq: number): WireMessage;
  /** Starts the transfer that the answer calls for. Operations on `pair` are posted before this returns, in the order of the answers. */
  answered(answer: Answer, pair: Pair): Reaction;
}

/** Which way its data goes: out with PUT, in with GET. */
export type Direction = 'put' | 'get';

export abstract class Announcement implements Unit {
  abstract readonly tensorId: TensorId;
  abstract readonly direction: Direction;
  /** Bytes of the tensor; undefined where only the answer will say. */
  abstract readonly bytes: number | undefined;
  /** It has been answered `2` once: the second time is the last. */
  renewed = false;
  /** It travels in no bundle (any more): its bundle was refused as a whole, or it does not lie as the cache does. */
  alone = false;
  /** It travels only with others of the same group, where it has one. */
  readonly group: string | undefined = undefined;
  /** Known by its answer: the peer is ours. */
  peerIsOurs = false;
  #ready = false;
  #whenReady: (() => void) | undefined;

  get parts(): readonly Announcement[] {
    return [this];
  }

  /** False while its memory is not there yet. What stands behind it in the queue waits, so that order is kept. */
  get ready(): boolean {
    return this.#ready;
  }

  markReady(): void {
    this.#ready = true;
    this.#whenReady?.();
  }

  onReady(run: () => void): void {
    this.#whenReady = run;
  }

  /** There is a pair with the peer while it waits for its turn. Called again where the pair has been opened anew. */
  pairOpened(): void {}

  /** Given up by its owner: nothing more is done for it, except what the wire demands. */
  abstract readonly cancelled: boolean;
  abstract message(ours: boolean, seq: number): WireMessage;
  abstract answered(answer: Answer, pair: Pair): Reaction;
  /** It will not be tried again. Idempotent. */
  abstract fail(error: PdError): void;
}
