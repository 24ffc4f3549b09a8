/**
 * Decides who may be in progress. Before NCCL 2.27 a thread has one slot for non-blocking work, and a second communicator's call
 * overwrites the first one's without an error; so there it is one at a time, in the order of asking. From 2.27 on everybody may.
 */
export class ProgressGate {
  readonly #open: boolean;
  readonly #waiting: object[] = [];
  #holder: object | undefined;

  constructor(concurrent: boolean) {
    this.#open = concurrent;
  }

  /** True: `who` may call now, and must `leave` once its call has settled. False: ask again later; the place in the queue is kept. */
  enter(who: object): boolean {
    if (this.#open || this.#holder === who) return true;
    if (!this.#waiting.includes(who)) this.#waiting.push(who);
    if (this.#holder !== undefined || this.#waiting[0] !== who) return false;
    this.#waiting.shift();
    this.#holder = who;
    return true;
  }

  /** Gives up the turn or the place in the queue. */
  leave(who: object): void {
    if (this.#holder === who) this.#holder = undefined;
    const at = this.#waiting.indexOf(who);
    if (at >= 0) this.#waiting.splice(at, 1);
  }
}

let threadGate: ProgressGate | undefined;

/** The slot is the thread's, so all transports of a thread share one gate. */
export function progressGate(concurrent: boolean): ProgressGate {
  threadGate ??= new ProgressGate(concurrent);
  return threadGate;
}
