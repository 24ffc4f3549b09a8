/** Progress while weights load: a log line about once a second, on a terminal a line that is redrawn, and one at the end. */
import { writeSync } from 'node:fs';
import { isatty } from 'node:tty';
import { progressLine } from '../../observability/bytes.ts';
import type { Logger } from '../../observability/log.ts';

const LOG_MS = 1_000;
const REDRAW_MS = 100;

/** Clears the line that the cursor is on. */
const CLEAR = '\r\x1b[K';
/** Without line wrap between them, so that a narrow terminal cuts a long line off. The log goes on from the line's start. */
const [BEGIN, END] = [`${CLEAR}\x1b[?7l`, '\x1b[?7h\r'];

/** Where the line is shown. */
export interface ProgressOutput {
  /** Absent where standard error is no terminal. */
  readonly draw?: (text: string) => void;
  /** False where whoever reads the log sees the drawn line already. */
  readonly logSteps: boolean;
}

/** By file number: in a thread `process.stderr` is a pipe to the main thread, which does not know of terminals. */
function standardOutput(): ProgressOutput {
  if (!isatty(2)) return { logSteps: true };
  return { draw: drawOnStderr, logSteps: !isatty(1) };
}

function drawOnStderr(text: string): void {
  try {
    writeSync(2, text);
  } catch {
    // a terminal that takes nothing now gets the next one
  }
}

export class LoadProgress {
  readonly #model: string;
  readonly #total: number;
  readonly #log: Pick<Logger, 'info'>;
  readonly #output: ProgressOutput;
  readonly #now: () => number;
  readonly #began: number;
  #done = 0;
  #loggedAt: number;
  #drawnAt = Number.NEGATIVE_INFINITY;

  constructor(
    model: string,
    total: number,
    log: Pick<Logger, 'info'>,
    output: ProgressOutput = standardOutput(),
    now: () => number = () => performance.now(),
  ) {
    this.#model = model;
    this.#total = total;
    this.#log = log;
    this.#output = output;
    this.#now = now;
    this.#began = now();
    this.#loggedAt = this.#began;
  }

  /** `bytes` more have arrived. */
  add(bytes: number): void {
    this.#done += bytes;
    const now = this.#now();
    const last = this.#done >= this.#total;
    if (!last && this.#output.draw && now - this.#drawnAt >= REDRAW_MS) {
      this.#drawnAt = now;
      this.#output.draw(`${BEGIN}${this.#line(now)}${END}`);
    }
    if (!last && (!this.#output.logSteps || now - this.#loggedAt < LOG_MS)) return;
    this.#loggedAt = now;
    if (last) this.end();
    this.#log.info({ model: this.#model, bytes: this.#done, total: this.#total }, this.#line(now));
  }

  /** Clears a drawn line. Idempotent. */
  end(): void {
    if (this.#drawnAt !== Number.NEGATIVE_INFINITY) this.#output.draw?.(CLEAR);
    this.#drawnAt = Number.NEGATIVE_INFINITY;
  }

  #line(now: number): string {
    const seconds = (now - this.#began) / 1_000;
    return progressLine(`weights of ${this.#model}`, this.#done, this.#total, seconds);
  }
}
