/** The grammar masks of one step: requested before it runs, ready when its tokens are drawn. */
import { type ErrorData, PdError } from '../errors.ts';
import type { ScheduledSequence } from '../scheduler/types.ts';
import type { StepHooks } from './executor.ts';

export class StepMasks {
  /** Sequences that get no token in this step, and why. */
  readonly failed = new Map<string, ErrorData>();
  readonly #asked = new Map<string, Promise<Uint32Array> | Uint32Array>();
  readonly #masks = new Map<string, Uint32Array>();

  constructor(sequences: readonly ScheduledSequence[], { mask: maskOf }: StepHooks) {
    for (const sequence of maskOf ? sequences : []) {
      const mask = sequence.sample && maskOf?.(sequence);
      if (!mask) continue;
      this.#asked.set(sequence.sequenceId, mask);
      // A rejection is handled in `settle`, which the step may not reach.
      if (mask instanceof Promise) mask.catch(() => {});
    }
  }

  /** Whether this sequence is under a grammar; before `settle` too. */
  has(sequenceId: string): boolean {
    return this.#asked.has(sequenceId);
  }

  /** Once the forward pass is under way. */
  async settle(): Promise<void> {
    for (const [sequenceId, mask] of this.#asked) {
      try {
        this.#masks.set(sequenceId, await mask);
      } catch (error) {
        this.failed.set(sequenceId, PdError.from(error).toData());
      }
    }
  }

  of(sequenceId: string): Uint32Array | undefined {
    return this.#masks.get(sequenceId);
  }
}
