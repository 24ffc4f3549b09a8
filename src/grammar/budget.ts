/** What building one grammar may cost. Everything that grows with its input asks here first, so that a bad one fails by name and soon. */
import { PdError } from '../errors.ts';

/** States of all automata of a grammar, before and after they are made deterministic. */
const MOST_STATES = 50_000;
/** Edges looked at while automata are built and combined. */
const MOST_WORK = 1_500_000;
/** What is within the other limits takes well below a second; this ends what a very busy machine makes of it. */
const MOST_MS = 800;
const CLOCK_EVERY = 1024;

export class Budget {
  #states = 0;
  #work = 0;
  #sinceClock = 0;
  readonly #now: () => number;
  readonly #until: number;

  /** `now` in milliseconds, on any monotonic clock. */
  constructor(now: () => number) {
    this.#now = now;
    this.#until = now() + MOST_MS;
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
    if (this.#now() > this.#until) throw tooCostly(`it takes longer than ${MOST_MS} ms to build`);
  }
}

function tooCostly(why: string): PdError {
  return new PdError(
    'REQUEST_INVALID',
    `the grammar is too large: ${why}; use lower repetition counts, fewer alternatives or shorter lists`,
  );
}
