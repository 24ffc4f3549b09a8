/**
 * When each of the latest requests passed the stages of its way, as one thread saw it. Proxy, main thread and core thread keep their own;
 * all read one clock, so that what they say of one request fits together, on one host.
 */

/** Milliseconds of CLOCK_MONOTONIC: the same clock in every thread and process of a host. */
export function monotonicMs(): number {
  return Number(process.hrtime.bigint()) / 1e6;
}

export interface Timeline<Stage extends string = string> {
  /** What this thread knows the request by: every id of one request holds the proxy's. */
  readonly id: string;
  /** In the order in which they came; a stage may come several times. `at`: `monotonicMs`. */
  readonly stages: readonly { readonly stage: Stage; readonly at: number }[];
}

/** Requests that are remembered. */
const MOST_REQUESTS = 64;
/** Of one request. What comes several times may fill it up, and then only its latest counts. */
const MOST_STAGES = 64;

export class Timelines<Stage extends string> {
  readonly #requests = new Map<string, { stage: Stage; at: number }[]>();

  /** Begins the timeline of `id` with its first stage; one of that id from before is forgotten. */
  begin(id: string, stage: Stage, at: number = monotonicMs()): void {
    this.#requests.delete(id);
    this.#requests.set(id, [{ stage, at }]);
    if (this.#requests.size > MOST_REQUESTS) this.#requests.delete(this.#requests.keys().next().value!);
  }

  /** Does nothing for an id that has not begun, or was long ago. */
  stamp(id: string, stage: Stage, at: number = monotonicMs()): void {
    const stages = this.#requests.get(id);
    if (!stages) return;
    const last = stages.at(-1);
    if (stages.length < MOST_STAGES || last?.stage !== stage) stages.push({ stage, at });
    else last.at = at;
  }

  /** The latest request last. */
  recent(): readonly Timeline<Stage>[] {
    return [...this.#requests].map(([id, stages]) => ({ id, stages: [...stages] }));
  }
}
