/**
 * When each of the latest requests passed the stages of its way, as one thread saw it, and what there is to say of it. A worker's main thread
 * and its core thread keep their own, the proxy its receipts (proxy/receipts.ts); all read one clock, so that what they say of one request
 * fits together, on one host.
 */
import { remember } from '../memories.ts';

/** Milliseconds of CLOCK_MONOTONIC: the same clock in every thread and process of a host. */
export function monotonicMs(): number {
  return Number(process.hrtime.bigint()) / 1e6;
}

export interface TimelineStage<Stage extends string = string> {
  readonly stage: Stage;
  /** `monotonicMs`. */
  readonly at: number;
  /** That it is about. */
  readonly tokens?: number;
}

/** What is known of a request beside its stages: bytes that came for it, by which transport. */
export type Facts = Readonly<Record<string, number | string>>;

export interface Timeline<Stage extends string = string> {
  /** What this thread knows the request by: every id of one request holds the proxy's. */
  readonly id: string;
  /** In the order in which they came; a stage may come several times. */
  readonly stages: readonly TimelineStage<Stage>[];
  readonly facts?: Facts;
}

interface Request<Stage extends string> {
  readonly stages: TimelineStage<Stage>[];
  facts: Facts | undefined;
}

/** Requests that are remembered. */
const MOST_REQUESTS = 256;
/** Of one request. What comes several times may fill it up, and then only its latest counts. */
const MOST_STAGES = 64;

export class Timelines<Stage extends string> {
  readonly #requests = new Map<string, Request<Stage>>();

  /** Begins the timeline of `id` with its first stage; one of that id from before is forgotten. */
  begin(id: string, stage: Stage, at: number = monotonicMs()): void {
    remember(this.#requests, id, { stages: [{ stage, at }], facts: undefined }, MOST_REQUESTS);
  }

  /** Does nothing for an id that has not begun, or was long ago. `tokens`: that the stage is about. */
  stamp(id: string, stage: Stage, at: number = monotonicMs(), tokens?: number): void {
    const stages = this.#requests.get(id)?.stages;
    if (!stages) return;
    if (stages.length >= MOST_STAGES && stages.at(-1)?.stage === stage) stages.pop();
    stages.push(tokens === undefined ? { stage, at } : { stage, at, tokens });
  }

  /** Likewise; what was known under the same names is replaced. */
  note(id: string, facts: Facts): void {
    const request = this.#requests.get(id);
    if (request) request.facts = { ...request.facts, ...facts };
  }

  get(id: string): Timeline<Stage> | undefined {
    const request = this.#requests.get(id);
    return request && timelineOf(id, request);
  }

  /** The latest request last. */
  recent(): readonly Timeline<Stage>[] {
    return [...this.#requests].map(([id, request]) => timelineOf(id, request));
  }
}

function timelineOf<Stage extends string>(id: string, { stages, facts }: Request<Stage>): Timeline<Stage> {
  return { id, stages: [...stages], ...(facts && { facts }) };
}
