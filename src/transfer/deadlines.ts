/**
 * Every deadline of the engine on one timer: there may be thousands of waits, and an idle engine has none. The timer never keeps a
 * process alive by itself; whoever waits does.
 */

export interface Deadline {
  /** Idempotent. */
  cancel(): void;
}

interface Entry {
  readonly at: number;
  /** Absent once cancelled or run. */
  run: (() => void) | undefined;
}

/** setTimeout takes a 32-bit number of milliseconds. */
const LONGEST_MS = 2 ** 31 - 1;

export class Deadlines {
  /** A binary heap by `at`; cancelled entries stay until they come up, or until they are most of it. */
  #heap: Entry[] = [];
  #cancelled = 0;
  #timer: NodeJS.Timeout | undefined;
  #timerAt = Number.POSITIVE_INFINITY;
  readonly #now: () => number;

  constructor(now: () => number = () => performance.now()) {
    this.#now = now;
  }

  /** Milliseconds on the clock that deadlines are measured by. */
  now(): number {
    return this.#now();
  }

  /** Deadlines that have neither run nor been cancelled. */
  get pending(): number {
    return this.#heap.length - this.#cancelled;
  }

  after(ms: number, run: () => void): Deadline {
    const entry: Entry = { at: this.#now() + Math.max(ms, 0), run };
    this.#push(entry);
    this.#arm();
    return {
      cancel: () => {
        if (!entry.run) return;
        entry.run = undefined;
        this.#cancelled++;
        this.#compact();
      },
    };
  }

  /** Forgets all of them. */
  clear(): void {
    this.#heap = [];
    this.#cancelled = 0;
    this.#disarm();
  }

  #arm(): void {
    const first = this.#heap[0];
    if (!first) {
      this.#disarm();
      return;
    }
    if (this.#timer && this.#timerAt <= first.at) return;
    this.#disarm();
    this.#timerAt = first.at;
    this.#timer = setTimeout(
      () => this.#fire(),
      Math.min(Math.max(Math.ceil(first.at - this.#now()), 1), LONGEST_MS),
    );
    this.#timer.unref();
  }

  #disarm(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#timerAt = Number.POSITIVE_INFINITY;
  }

  #fire(): void {
    this.#disarm();
    const now = this.#now();
    while (this.#heap[0] && (this.#heap[0].at <= now || !this.#heap[0].run)) {
      const entry = this.#pop();
      const run = entry.run;
      entry.run = undefined;
      if (run) run();
      else this.#cancelled--;
    }
    this.#arm();
  }

  #compact(): void {
    if (this.#cancelled < 64 || this.#cancelled * 2 < this.#heap.length) return;
    const live = this.#heap.filter((entry) => entry.run);
    this.#heap = [];
    this.#cancelled = 0;
    for (const entry of live) this.#push(entry);
    this.#arm();
  }

  #push(entry: Entry): void {
    const heap = this.#heap;
    let at = heap.push(entry) - 1;
    while (at > 0) {
      const up = (at - 1) >> 1;
      if (heap[up]!.at <= entry.at) break;
      heap[at] = heap[up]!;
      at = up;
    }
    heap[at] = entry;
  }

  #pop(): Entry {
    const heap = this.#heap;
    const top = heap[0]!;
    const last = heap.pop()!;
    if (heap.length === 0) return top;
    let at = 0;
    for (;;) {
      let down = at * 2 + 1;
      if (down >= heap.length) break;
      if (down + 1 < heap.length && heap[down + 1]!.at < heap[down]!.at) down++;
      if (heap[down]!.at >= last.at) break;
      heap[at] = heap[down]!;
      at = down;
    }
    heap[at] = last;
    return top;
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
