/** What building one grammar may cost. Everything that grows with its input asks here first, so that a bad one fails by name and soon. */
import { PdError } from '../errors.ts';

/** States of all automata of a grammar, before and after they are made deterministic. */
const MOST_STATES = 50_000;
/** Edges looked at while automata are built and combined, and parts of schemas while these are read: each some 0.3 µs on a 2-core VM. */
const MOST_WORK = 1_500_000;
/**
 * CPU time: most of what is too large ends by the other limits, and this ends the rest. Of the schemas in test/wide/grammars.test.ts those that
 * are taken need 0.3 s at most, 0.65 s by code that is not hot yet on a machine that is busy with other things.
 */
const MOST_MS = 700;
/** The same on a machine so busy that the thread rarely runs; well within what the thread has for a whole body. */
const MOST_WALL_MS = 4_000;
const CLOCK_EVERY = 1024;

export class Budget {
  #states = 0;
  #work = 0;
  #sinceClock = 0;
  readonly #now: () => number;
  readonly #cpu: () => number | undefined;
  readonly #began: number;
  readonly #cpuBegan: number | undefined;
  /** By `now`: before that neither time can be over. */
  #look: number;

  /** In milliseconds: `now` on any monotonic clock, `cpu` of this thread alone, so that what else a machine does is not held against a grammar; undefined where nobody counts it. */
  constructor(now: () => number, cpu: () => number | undefined = now) {
    this.#now = now;
    this.#cpu = cpu;
    this.#began = now();
    this.#cpuBegan = cpu();
    this.#look = this.#began + MOST_MS;
  }

  /** Throws REQUEST_INVALID where that is too many in all. */
  states(count: number): void {
    this.#states += count;
    if (this.#states > MOST_STATES) {
      throw tooCostly(`it has more than ${MOST_STATES.toLocaleString('en')} states`);
    }
    this.work(count);
  }

  work(steps: number): void {
    this.#work += steps;
    if (this.#work > MOST_WORK) throw tooCostly('putting its parts together takes too many steps');
    this.#sinceClock += steps;
    if (this.#sinceClock < CLOCK_EVERY) return;
    this.#sinceClock = 0;
    const now = this.#now();
    if (now <= this.#look) return;
    const cpu = this.#cpu();
    const counted = cpu !== undefined && this.#cpuBegan !== undefined;
    const left = MOST_MS - (counted ? cpu - this.#cpuBegan : now - this.#began);
    const last = this.#began + MOST_WALL_MS;
    if (left <= 0 || now > last) {
      throw tooCostly(`it takes longer than ${left <= 0 ? MOST_MS : MOST_WALL_MS} ms to build`);
    }
    this.#look = Math.min(now + left, last);
  }
}

function tooCostly(why: string): PdError {
  return new PdError(
    'REQUEST_INVALID',
    `the grammar is too large: ${why}; use lower repetition counts, fewer alternatives or shorter lists`,
  );
}
