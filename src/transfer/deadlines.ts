/**
 * Every deadline of the engine, so that all of them can be dropped at its end. None keeps a process alive by itself; whoever waits does.
 */

export interface Deadline {
  /** Idempotent. */
  cancel(): void;
}

/** setTimeout takes a 32-bit number of milliseconds. */
const LONGEST_MS = 2 ** 31 - 1;

export class Deadlines {
  readonly #now: () => number;
  /** Of each that has neither run nor been cancelled. */
  readonly #pending = new Set<{ timer: NodeJS.Timeout | undefined }>();

  constructor(now: () => number = () => performance.now()) {
    this.#now = now;
  }

  /** Milliseconds on the clock that deadlines are measured by. */
  now(): number {
    return this.#now();
  }

  after(ms: number, run: () => void): Deadline {
    const at = this.#now() + Math.max(ms, 0);
    const one: { timer: NodeJS.Timeout | undefined } = { timer: undefined };
    const wait = () => {
      const left = Math.max(Math.ceil(at - this.#now()), 0);
      one.timer = setTimeout(look, Math.min(left, LONGEST_MS)).unref();
    };
    // Node counts whole milliseconds, from the beginning of the turn in which a timer was set: it may fire too early.
    const look = () => {
      if (this.#now() < at) return wait();
      this.#pending.delete(one);
      run();
    };
    this.#pending.add(one);
    wait();
    return {
      cancel: () => {
        clearTimeout(one.timer);
        this.#pending.delete(one);
      },
    };
  }

  /** Forgets all of them. */
  clear(): void {
    for (const { timer } of this.#pending) clearTimeout(timer);
    this.#pending.clear();
  }
}

/** Looks after what grows old, every so many milliseconds; with nothing of it there, no timer runs. */
export class Sweep {
  readonly #deadlines: Deadlines;
  readonly #everyMs: number;
  readonly #run: () => boolean;
  #armed = false;

  /** `run` tells whether anything is left. */
  constructor(deadlines: Deadlines, everyMs: number, run: () => boolean) {
    this.#deadlines = deadlines;
    this.#everyMs = everyMs;
    this.#run = run;
  }

  /** There is something. Idempotent. */
  arm(): void {
    if (this.#armed) return;
    this.#armed = true;
    this.#deadlines.after(this.#everyMs, () => {
      this.#armed = false;
      if (this.#run()) this.arm();
    });
  }
}
