/** What is announced to a peer on a pair of ours, and answered by it: a PUT or a GET. */
import type { PdError } from '../errors.ts';
import type { Pair } from '../transport/transport.ts';
import type { TensorId } from '../wire/ids.ts';
import type { Answer, GetMessage, PutMessage } from '../wire/messages.ts';

/** What an answer means to the announcement it answers. */
export type Verdict =
  /** Dealt with (a transfer may be under way on the pair). */
  | 'settled'
  /** The answer belongs to the other kind of announcement. */
  | 'unexpected';

export abstract class Announcement {
  abstract readonly tensorId: TensorId;
  /** It has been answered `2` once: the second time is the last. */
  renewed = false;
  #ready = false;
  #whenReady: (() => void) | undefined;

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

  /** Given up by its owner: nothing more is done for it, except what the wire demands. */
  abstract readonly cancelled: boolean;
  /** `ours`: the peer is known to be ours, so that our fields may go along. */
  abstract message(ours: boolean, seq: number): PutMessage | GetMessage;
  /** Starts the transfer that the answer calls for. Operations on `pair` are posted before this returns, in the order of the answers. */
  abstract answered(answer: Answer, pair: Pair): Verdict;
  /** It will not be tried again. Idempotent. */
  abstract fail(error: PdError): void;
}
