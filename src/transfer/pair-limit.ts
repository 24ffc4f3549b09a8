/** Keeps the number of open pairs within a limit: what is idle is closed on both ends, least recently used first. */
import type { Deadlines } from './deadlines.ts';

/** Between looks while there are too many and none could be closed. */
const LOOK_AGAIN_MS = 1_000;

/** An open pair, whichever side opened it. */
export interface OpenPair {
  readonly lastUsedAt: number;
  /** Idle, and the peer knows how to close. */
  readonly closable: boolean;
  /** Begins to close it; it counts until it is over. */
  close(why: string): void;
}

export class PairLimit {
  readonly #most: number;
  readonly #deadlines: Deadlines;
  readonly #open: () => readonly OpenPair[];
  #armed = false;

  constructor(most: number, deadlines: Deadlines, open: () => readonly OpenPair[]) {
    this.#most = most;
    this.#deadlines = deadlines;
    this.#open = open;
  }

  /** A pair has been opened. */
  check(): void {
    const open = this.#open();
    const excess = open.length - this.#most;
    if (excess <= 0) return;
    const why = `${open.length} pairs are open, ${this.#most} are to stay (--max-peers)`;
    const idle = open.filter(({ closable }) => closable).sort((a, b) => a.lastUsedAt - b.lastUsedAt);
    for (const pair of idle.slice(0, excess)) pair.close(why);
    if (this.#armed) return;
    this.#armed = true;
    this.#deadlines.after(LOOK_AGAIN_MS, () => {
      this.#armed = false;
      this.check();
    });
  }
}
