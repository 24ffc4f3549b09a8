/** A step's rows: all tokens of all its sequences, one after another. One layout for every executor. Pure. */
import { PdError } from '../errors.ts';
import type { SampleSpec, ScheduledSequence } from '../scheduler/types.ts';

export interface SampledRow {
  /** Row whose logits the token is sampled from. */
  readonly row: number;
  readonly sequence: ScheduledSequence;
  readonly sample: SampleSpec;
}

/** Of the sequences that get a token in this step, in batch order. */
export function sampledRows(sequences: readonly ScheduledSequence[]): SampledRow[] {
  const last = lastRows(sequences);
  return sequences.flatMap((sequence, i) =>
    sequence.sample ? [{ row: last[i]!, sequence, sample: sequence.sample }] : [],
  );
}

/** Row of each sequence's last token. */
export function lastRows(sequences: readonly ScheduledSequence[]): number[] {
  let row = -1;
  return sequences.map(({ tokens }) => {
    row += tokens.length;
    return row;
  });
}

export function rowCount(sequences: readonly ScheduledSequence[]): number {
  return sequences.reduce((sum, { tokens }) => sum + tokens.length, 0);
}

/** Slot of the KV of `position`: block * blockSize + offset. NaN where the table ends before it. */
export function slotOf(blockTable: Int32Array, blockSize: number, position: number): number {
  return blockTable[Math.floor(position / blockSize)]! * blockSize + (position % blockSize);
}

/** What tokens and blocks are checked against. */
export interface RowLimits {
  readonly blockSize: number;
  readonly numBlocks: number;
  readonly vocab: number;
}

/**
 * Calls `put` for each token of a sequence, `index` from 0 on, with its position and the slot of its KV.
 * Throws INTERNAL for what no scheduler should produce: it would read or write arbitrary memory.
 */
export function placeTokens(
  { tokens, start, blockTable, sequenceId }: ScheduledSequence,
  { blockSize, numBlocks, vocab }: RowLimits,
  put: (index: number, token: number, position: number, slot: number) => void,
): void {
  for (let i = 0; i < tokens.length; i++) {
    const position = start + i;
    const token = tokens[i]!;
    const slot = slotOf(blockTable, blockSize, position);
    const what = `sequence ${sequenceId}:`;
    if (!(token >= 0 && token < vocab)) {
      throw new PdError(
        'INTERNAL',
        `${what} token ${token} at position ${position} is outside of the vocabulary`,
      );
    }
    if (!(slot >= 0 && slot < numBlocks * blockSize)) {
      throw new PdError(
        'INTERNAL',
        `${what} position ${position} has no block in its table of ${blockTable.length}`,
      );
    }
    put(i, token, position, slot);
  }
}
