/**
 * What has been counted of requests, in plain numbers: a request adds to them, and a metric reads them when somebody looks (metrics.ts). A
 * library's counter makes a text of its labels each time. Pure.
 */

/** Seconds: upper bounds of a histogram's buckets. */
const SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];
const BOUNDS = [...SECONDS, '+Inf'] as const;

/** How long something took, in buckets. */
export class Durations {
  readonly #counts = BOUNDS.map(() => 0);
  #sum = 0;

  observe(seconds: number): void {
    let at = 0;
    while (at < SECONDS.length && seconds > SECONDS[at]!) at++;
    this.#counts[at]!++;
    this.#sum += seconds;
  }

  read() {
    let count = 0;
    const cumulative = BOUNDS.map((le, at) => {
      count += this.#counts[at]!;
      return { le, count };
    });
    return { cumulative, sum: this.#sum };
  }
}

/** By a name, of which there are few. */
export class Counts<Name extends string | number> {
  readonly #counts = new Map<Name, number>();

  inc(name: Name, by = 1): void {
    this.#counts.set(name, (this.#counts.get(name) ?? 0) + by);
  }

  read(): Iterable<readonly [Name, number]> {
    return this.#counts;
  }
}

/** Requests that came to one path. */
export class RouteTally {
  /** By the status that the client got. */
  readonly statuses = new Counts<number>();
  /** By the code of what went wrong. */
  readonly errors = new Counts<string>();
  /** To the end of the answer. */
  readonly seconds = new Durations();
}

/** `refused`: the instance did not take it, and no part of it was answered. */
export type Outcome = 'success' | 'failure' | 'refused';

/** What one instance was asked by this proxy, since it first pinged. */
export class InstanceTally {
  readonly outcomes: Record<Outcome, number> = { success: 0, failure: 0, refused: 0 };
  /** Requests that were to go there, and the tokens of their prompts, by whether it was thought to have them cached. */
  readonly placed = { requests: 0, cached: 0, uncached: 0 };
  /** Requests that went to another pair, as this one did not take them. */
  retries = 0;
  /** From asking to the end of the answer, of prompts that were computed. */
  readonly prefill = new Durations();
  /** Of streamed answers, from the request's arrival to the first event. */
  readonly firstEvent = new Durations();
}
