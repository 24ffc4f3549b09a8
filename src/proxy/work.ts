/**
 * What one instance has to do, as far as this proxy can know: what its pings tell, and what this proxy has given it since. Pure.
 *
 *   requests   the larger of: told (running and waiting) and given since; given by this proxy and not over
 *   tokens     the larger of: told and given since; half of what was given and is not over, as the rest may have been computed. Without a
 *              word from the instance (vLLM's workers), given and not over
 *
 * "Since" begins a little before the ping came: what was on its way then is not in it. A worker that tells too little is still known to
 * have what this proxy has given it, so it gets at most about twice as much as others; one that tells too much gets less, which harms
 * itself alone.
 */
import type { WorkerLoad } from '../wire/messages.ts';

/** For a request to reach a worker and be counted there, and for the worker's ping to come back. */
const UNDER_WAY_MS = 50;

/** Fewer tokens say more of HTTP than of computing. */
const LEAST_LEARNT = 1_024;
/** What the latest prompt counts for. */
const LEARNT_SHARE = 0.2;
/** Of a token, so that one that lies or hangs is still compared by what it has to do. */
const FASTEST_MS = 0.001;
const SLOWEST_MS = 100;

interface Given {
  readonly tokens: number;
  readonly atMs: number;
  /** Not in what the instance has told. */
  since: boolean;
}

export class InstanceWork {
  /** About what a prompt token takes it, as seen by this proxy; undefined until it has been. */
  msPerToken: number | undefined;
  readonly #now: () => number;
  readonly #given = new Set<Given>();
  /** Of `#given`, sums. */
  #tokens = 0;
  #requestsSince = 0;
  #tokensSince = 0;
  #told: WorkerLoad | undefined;

  /** `now` is monotonic, in milliseconds. */
  constructor(now: () => number) {
    this.#now = now;
  }

  tell(load: WorkerLoad): void {
    this.#told = load;
    const known = this.#now() - UNDER_WAY_MS;
    for (const given of this.#given) if (given.since && given.atMs < known) this.#settle(given);
  }

  /** One request more, with so many prompt tokens to compute there. Returns the function that takes it off again. */
  begin(tokens: number): () => void {
    const given: Given = { tokens, atMs: this.#now(), since: true };
    this.#given.add(given);
    this.#tokens += tokens;
    this.#requestsSince++;
    this.#tokensSince += tokens;
    return () => {
      if (!this.#given.delete(given)) return;
      this.#tokens -= tokens;
      this.#settle(given);
    };
  }

  /** A prompt was answered after so long, with so many tokens to be computed before and for it. */
  learn(tokens: number, ms: number): void {
    if (tokens < LEAST_LEARNT) return;
    const seen = Math.min(SLOWEST_MS, Math.max(FASTEST_MS, ms / tokens));
    this.msPerToken ??= seen;
    this.msPerToken += (seen - this.msPerToken) * LEARNT_SHARE;
  }

  /** Requests of this proxy. */
  get own(): number {
    return this.#given.size;
  }

  get requests(): number {
    const told = this.#told ? this.#told.running + this.#told.waiting + this.#requestsSince : 0;
    return Math.max(told, this.#given.size);
  }

  /** Prompt tokens that are to be computed there. */
  get queuedTokens(): number {
    if (!this.#told) return this.#tokens;
    return Math.max(this.#told.queuedTokens + this.#tokensSince, this.#tokens / 2);
  }

  /** Share of its KV cache that is in use, 0 to 1; 0 where it is not told. */
  get kvUse(): number {
    return this.#told && this.#told.kvBlocks > 0 ? Math.min(1, this.#told.kvUsed / this.#told.kvBlocks) : 0;
  }

  #settle(given: Given): void {
    if (!given.since) return;
    given.since = false;
    this.#requestsSince--;
    this.#tokensSince -= given.tokens;
  }
}
