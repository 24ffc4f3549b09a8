/**
 * `--debug-logits`: the logits of every sampled token, in files, two per sequence: `<sequence>.<role>.f32`, a row of the vocabulary for
 * each token, and `.jsonl`, whose line i says what row i is. Opened for each row and closed, so that they can be read at any time.
 */
import { accessSync, appendFileSync, constants, mkdirSync } from 'node:fs';
import { join } from 'node:path';
import type { WorkerRole } from '../config/worker-config.ts';
import { PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import type { ForwardBatch, ForwardResult, ScheduledSequence } from '../scheduler/types.ts';
import type { Executor, StepHooks } from './executor.ts';

/** Put round an executor: everything is passed on, and the logits written. */
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

/** File systems take 255 bytes. The end of an id is what tells it from others. */
const MOST_NAME = 200;

export interface LogitsFilesOptions {
  readonly dir: string;
  /** In the names: both halves of a pair may write to one directory, and under one id. */
  readonly role: WorkerRole;
  readonly log?: Logger;
}

export class LogitsFiles {
  readonly #options: LogitsFilesOptions;
  #stopped = false;

  private constructor(options: LogitsFilesOptions) {
    this.#options = options;
  }

  /** Makes the directory where there is none. Throws CONFIG_INVALID where it cannot be written. */
  static open(options: LogitsFilesOptions): LogitsFiles {
    const { dir } = options;
    try {
      mkdirSync(dir, { recursive: true });
      accessSync(dir, constants.W_OK | constants.X_OK);
    } catch (cause) {
      throw new PdError(
        'CONFIG_INVALID',
        `--debug-logits ${dir}: expected a directory that can be written (${PdError.from(cause).message})`,
        {},
        { cause },
      );
    }
    return new LogitsFiles(options);
  }

  /** Whether it is there. After the first failure nothing is written any more: serving goes on. */
  writeRow(sequence: ScheduledSequence, logits: Float32Array): boolean {
    if (this.#stopped) return false;
    const bytes = new Uint8Array(logits.buffer, logits.byteOffset, logits.byteLength);
    return this.#append(sequence, 'f32', bytes);
  }

  /** What the last row of this sequence is; without `sampled`, one of a step that failed. */
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
    const { dir, role, log } = this.#options;
    const path = join(dir, `${fileName(sequenceId)}.${role}.${ending}`);
    try {
      appendFileSync(path, data);
      return true;
    } catch (err) {
      if (!this.#stopped) {
        log?.warn(
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
