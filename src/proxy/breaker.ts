/**
 * Whether an instance is worth asking, by what became of what it was asked. Pure.
 *
 *   closed --(3 failures in a row, or told to)--> open --(its time is over)--> half-open: one request tries
 *     ^                                             ^                             |
 *     +------------------- success -----------------|-----------------------------+
 *                                                   +--------- failure, twice the time
 */

const FAILURES = 3;
const OPEN_MS = 1_000;
const LONGEST_MS = 30_000;

export type BreakerState = 'closed' | 'open' | 'half-open';

export class Breaker {
  readonly #now: () => number;
  #failures = 0;
  /** 0: closed. */
  #openMs = 0;
  #untilMs = 0;
  /** When the request that tries was let through. */
  #triedMs: number | undefined;
  /** How often it has opened, or has again after a request that tried. */
  ejections = 0;

  /** `now` is monotonic, in milliseconds. */
  constructor(now: () => number) {
    this.#now = now;
  }

  get state(): BreakerState {
    if (this.#openMs === 0) return 'closed';
    const now = this.#now();
    if (now < this.#untilMs) return 'open';
    // One that never tells how it went, or takes long, does not keep it from being tried again.
    return this.#triedMs !== undefined && now < this.#triedMs + LONGEST_MS ? 'open' : 'half-open';
  }

  /** A request goes there: while half-open no other does until it is known how that went. */
  chosen(): void {
    if (this.state === 'half-open') this.#triedMs = this.#now();
  }

  succeeded(): void {
    this.#failures = 0;
    // While it is open, what had been asked before says nothing new.
    if (this.#openMs === 0 || this.#now() < this.#untilMs) return;
    this.#openMs = 0;
    this.#triedMs = undefined;
  }

  failed(): void {
    this.#failures++;
    const tried = this.#triedMs !== undefined && this.#now() >= this.#untilMs;
    if (tried || (this.#openMs === 0 && this.#failures >= FAILURES)) this.open();
  }

  /** There is reason to think that it is well again: the next request may try. */
  mayTry(): void {
    this.#untilMs = Math.min(this.#untilMs, this.#now());
    this.#triedMs = undefined;
  }

  /** At once, whatever the count. */
  open(ms = OPEN_MS): void {
    if (this.#openMs === 0 || this.#now() >= this.#untilMs) this.ejections++;
    this.#openMs = Math.min(LONGEST_MS, Math.max(ms, this.#openMs * 2));
    this.#untilMs = this.#now() + this.#openMs;
    this.#triedMs = undefined;
    this.#failures = 0;
  }
}
