/** Decides when a worker's load is reported: soon after it changes, but not at every step. */
import type { WorkerLoad } from '../wire/messages.ts';

/** Between two reports. */
const PAUSE_MS = 100;
/** Of the KV cache: less than this by itself is no change. */
const KV_STEP = 0.01;

/** Close it: it may have a timer. */
export class LoadReport {
  readonly #read: () => WorkerLoad;
  readonly #tell: (load: WorkerLoad) => void;
  readonly #now: () => number;
  #told: WorkerLoad | undefined;
  #lookedAt = Number.NEGATIVE_INFINITY;
  #timer: NodeJS.Timeout | undefined;

  /** `read` is called when a report is due, so that nothing is counted at every step. `now`: monotonic, ms. */
  constructor(
    read: () => WorkerLoad,
    tell: (load: WorkerLoad) => void,
    now: () => number = () => performance.now(),
  ) {
    this.#read = read;
    this.#tell = tell;
    this.#now = now;
  }

  /** Something may have changed. */
  changed(): void {
    if (this.#timer) return;
    const dueMs = this.#lookedAt + PAUSE_MS - this.#now();
    if (dueMs <= 0) this.#look();
    else this.#timer = setTimeout(() => this.#look(), dueMs).unref();
  }

  close(): void {
    clearTimeout(this.#timer);
  }

  #look(): void {
    this.#timer = undefined;
    this.#lookedAt = this.#now();
    const load = this.#read();
    if (this.#told && !differs(this.#told, load)) return;
    this.#told = load;
    this.#tell(load);
  }
}

function differs(a: WorkerLoad, b: WorkerLoad): boolean {
  return (
    a.running !== b.running ||
    a.waiting !== b.waiting ||
    a.queuedTokens !== b.queuedTokens ||
    Math.abs(a.kvUsed - b.kvUsed) > b.kvBlocks * KV_STEP
  );
}
