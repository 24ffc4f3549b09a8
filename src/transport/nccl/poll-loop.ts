/** Polling without a timer: one setImmediate chain while something is in flight, nothing at all while idle. */

/** Looks once. False: it is through and wants no more turns. */
export type Poll = (now: number) => boolean;

export class PollLoop {
  readonly #polls = new Set<Poll>();
  #scheduled = false;

  /** `poll` gets its turns from now on. It must not throw. Adding it again changes nothing. */
  add(poll: Poll): void {
    this.#polls.add(poll);
    this.#schedule();
  }

  delete(poll: Poll): void {
    this.#polls.delete(poll);
  }

  get active(): number {
    return this.#polls.size;
  }

  #schedule(): void {
    if (this.#scheduled || this.#polls.size === 0) return;
    this.#scheduled = true;
    setImmediate(() => {
      this.#scheduled = false;
      const now = performance.now();
      for (const poll of [...this.#polls]) if (!poll(now)) this.#polls.delete(poll);
      this.#schedule();
    });
  }
}
