/**
 * `--debug-logits`: the logits of every sampled token, in files, two per sequence: `<sequence>.<role>.f32`, a row of the vocabulary for
 * each token, and `.jsonl`, whose line i says what row i is. Each is opened and closed for every row, so that it can be read at any time.
 */
import { accessSync, appendFileSync, constants, mkdirSync } from 'node:fs';
import { join } from 'node:path';
import type { WorkerRole } from '../config/worker-config.ts';
import { PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import type { ForwardBatch, ForwardResult, ScheduledSequence } from '../scheduler/types.ts';
import type { Executor, StepHooks } from './executor.ts';

/** Wraps an executor: passes everything on and writes the logits. */
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
      // also if sampling failed: logits that are not numbers are what one is looking for
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

/** File systems allow 255 bytes. Ids differ at their ends. */
const MOST_NAME = 200;

export class LogitsFiles {
  readonly #dir: string;
  readonly #role: WorkerRole;
  readonly #log: Logger | undefined;
  #stopped = false;

  /**
   * Creates the directory if there is none. `role` is part of the names: both halves of a pair may write to one directory, and under one
   * id. Throws CONFIG_INVALID if the directory is not writable.
   */
  constructor(dir: string, role: WorkerRole, log?: Logger) {
    try {
      mkdirSync(dir, { recursive: true });
      accessSync(dir, constants.W_OK | constants.X_OK);
    } catch (cause) {
      const { message } = PdError.from(cause);
      const what = `--debug-logits ${dir}: expected a directory that can be written (${message})`;
      throw new PdError('CONFIG_INVALID', what, {}, { cause });
    }
    this.#dir = dir;
    this.#role = role;
    this.#log = log;
  }

  /** False if the row was not written. After the first failure no more is written, and serving goes on. */
  writeRow(sequence: ScheduledSequence, logits: Float32Array): boolean {
    if (this.#stopped) return false;
    const bytes = new Uint8Array(logits.buffer, logits.byteOffset, logits.byteLength);
    return this.#append(sequence, 'f32', bytes);
  }

  /** Describes the last row of this sequence; without `sampled`, that of a step that failed. */
  writeLine(sequence: ScheduledSequence, sampled: number | undefined): void {
    const { transferId, sequenceId, sample, start, tokens } = sequence;
    const line = {
      request: transferId,
      sequence: sequenceId,
      index: sample?.index ?? 0,
      position: start + tokens.length - 1,
      tokens: Array.from(tokens),
      sampled: sampled ?? null,
    };
    this.#append(sequence, 'jsonl', `${JSON.stringify(line)}\n`);
  }

  #append({ sequenceId }: ScheduledSequence, ending: 'f32' | 'jsonl', data: Uint8Array | string): boolean {
    const path = join(this.#dir, `${fileName(sequenceId)}.${this.#role}.${ending}`);
    try {
      appendFileSync(path, data);
      return true;
    } catch (err) {
      if (!this.#stopped) {
        this.#log?.warn(
          { err },
          `--debug-logits: ${path} cannot be written; its last row may be cut off, and no more logits are written: ${PdError.from(err).message}`,
        );
      }
      this.#stopped = true;
      return false;
    }
  }
}

/** Ids hold what clients send. */
function fileName(sequenceId: string): string {
  return sequenceId.replace(/[^\w.-]/g, '_').slice(-MOST_NAME);
}
