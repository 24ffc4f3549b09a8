/** What `--debug-logits` puts round an executor: the logits of every sampled token go to files, all else is passed on. */
import type { ForwardBatch, ForwardResult, ScheduledSequence } from '../scheduler/types.ts';
import type { Executor, StepHooks } from './executor.ts';
import type { LogitsFiles } from './logits-files.ts';

export class DebugLogits implements Executor {
  readonly layers: Executor['layers'];
  readonly vocabSize: number;
  readonly #executor: Executor;
  readonly #files: LogitsFiles;

  constructor(executor: Executor, files: LogitsFiles) {
    this.layers = executor.layers;
    this.vocabSize = executor.vocabSize;
    this.#executor = executor;
    this.#files = files;
  }

  async forward(batch: ForwardBatch, hooks: StepHooks): Promise<ForwardResult> {
    const written: ScheduledSequence[] = [];
    const tokens = new Map<string, number>();
    const sampling: StepHooks['sampling'] = (sequence, logits) => {
      hooks.sampling?.(sequence, logits);
      // at once: a batch's rows of a large vocabulary are too much to keep
      if (this.#files.writeRow(sequence, logits)) written.push(sequence);
    };
    try {
      const result = await this.#executor.forward(batch, { ...hooks, sampling });
      for (const { sequenceId, token } of result.sampled) tokens.set(sequenceId, token);
      return result;
    } finally {
      // also where sampling failed: logits that are no numbers are what one looks for
      for (const sequence of written) this.#files.writeLine(sequence, tokens.get(sequence.sequenceId));
    }
  }

  async logits(batch: ForwardBatch): Promise<Float32Array> {
    return this.#executor.logits(batch);
  }

  dispose(): void {
    this.#executor.dispose();
  }
}
