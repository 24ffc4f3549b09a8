/** Messages of one link that are announced and not answered, oldest first, and the deadline of the oldest. */
import { PdError } from '../../errors.ts';
import type { Deadline, Deadlines } from '../deadlines.ts';
import type { Announcement, Unit } from './announcement.ts';

interface Waiting {
  readonly unit: Unit;
  readonly seq: number;
  readonly since: number;
}

/** Messages. */
export interface Progress {
  readonly waiting: number;
  readonly answered: number;
}

export interface OutstandingOptions {
  readonly deadlines: Deadlines;
  readonly answerTimeoutMs: number;
  /** Data moves on the pair: its own deadlines watch, and a serial listener answers after it. */
  moving(): boolean;
  /** The oldest was not answered in time. */
  onLate(unit: Unit, progress: Progress): void;
}

export class Outstanding {
  readonly #options: OutstandingOptions;
  readonly #waiting: Waiting[] = [];
  #progressAt = 0;
  #answered = 0;
  #deadline: Deadline | undefined;

  constructor(options: OutstandingOptions) {
    this.#options = options;
  }

  /** Messages. */
  get length(): number {
    return this.#waiting.length;
  }

  /** Tensors. */
  get tensors(): number {
    return this.#waiting.reduce((sum, { unit }) => sum + unit.parts.length, 0);
  }

  add(unit: Unit, seq: number): void {
    this.#waiting.push({ unit, seq, since: this.#options.deadlines.now() });
    if (this.#waiting.length === 1) this.#arm();
  }

  /** What an answer belongs to: one without `seq` to the oldest. Undefined where that is nothing. */
  take(seq: number | undefined): Unit | undefined {
    const at = seq === undefined ? 0 : this.#waiting.findIndex((one) => one.seq === seq);
    const [one] = at < 0 ? [] : this.#waiting.splice(at, 1);
    this.#progressAt = this.#options.deadlines.now();
    if (one) this.#answered++;
    this.#arm();
    return one?.unit;
  }

  /** Takes all tensors out; nothing is watched any more. */
  clear(): Announcement[] {
    this.#deadline?.cancel();
    return this.#waiting.splice(0).flatMap(({ unit }) => unit.parts);
  }

  #arm(): void {
    this.#deadline?.cancel();
    this.#deadline = undefined;
    const [oldest] = this.#waiting;
    if (!oldest) return;
    const { deadlines, answerTimeoutMs } = this.#options;
    const due = Math.max(oldest.since, this.#progressAt) + answerTimeoutMs;
    this.#deadline = deadlines.after(due - deadlines.now(), () => {
      if (!this.#options.moving())
        return this.#options.onLate(oldest.unit, { waiting: this.#waiting.length, answered: this.#answered });
      this.#progressAt = deadlines.now();
      this.#arm();
    });
  }
}

export function lateError(
  peer: string,
  unit: Unit,
  { waiting, answered }: Progress,
  timeoutMs: number,
): PdError {
  const tensorId = unit.parts[0]!.tensorId;
  return new PdError(
    'PEER_ANSWER_TIMEOUT',
    `peer ${peer} did not answer the announcement of ${tensorId} within ${timeoutMs} ms` +
      ` (${waiting} outstanding, ${answered} answers so far)`,
    { peer, tensorId },
  );
}
