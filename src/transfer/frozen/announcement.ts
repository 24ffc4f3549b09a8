/** What is announced to a peer and answered by it: a PUT or a GET. */
import type { PdError } from '../../errors.ts';
import type { Pair } from '../../transport/transport.ts';
import type { TensorId } from '../../wire/ids.ts';
import type { Answer, WireMessage } from '../../wire/messages.ts';

export abstract class Announcement {
  abstract readonly tensorId: TensorId;
  /** It has been announced on a pair that is gone: the second time is the last. */
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

  /** There is a pair with the peer while it waits for its turn. Called again where the pair has been opened anew. */
  pairOpened(): void {}

  /** Given up by its owner: nothing more is done for it, except what the wire demands. */
  abstract readonly cancelled: boolean;
  /** `ours`: the peer is known to be ours, so that our field may go along. */
  abstract message(ours: boolean): WireMessage;
  /**
   * Starts the transfer that the answer calls for: its operation on `pair` is posted before this returns, since data travels in the order of
   * the answers. False where the answer belongs to another kind of announcement.
   */
  abstract answered(answer: Answer, pair: Pair, ours: boolean): boolean;
  /** It will not be tried again. Idempotent. */
  abstract fail(error: PdError): void;
}
