/**
 * A step as the kernels read it: one block of int32 that goes to the GPU in one copy. Pure.
 *
 *   tokens[rows] positions[rows] slots[rows] | queryRows[d] contexts[d] tableStarts[d] | items[p][4] | draws[s][5] | chosen[s] | tables...
 *
 * Sequences with one new token go to the decode kernel (d of them), the others in items of at most 128 rows to the prefill kernel (p),
 * the longest first. `chosen` are the rows whose logits are wanted, `draws` how their tokens are drawn. Where each part begins depends on
 * the counts alone, so a graph that was captured for n padded sequences finds them again in every step of n.
 */
import { PdError } from '../../errors.ts';
import type { SampleSpec, ScheduledSequence } from '../../scheduler/types.ts';
import { uniform } from '../random.ts';
import { placeTokens, type RowLimits, rowCount } from '../rows.ts';
import { PREFILL_ROWS } from './kernels.ts';

interface StepCounts {
  readonly rows: number;
  /** Sequences of the decode kernel. */
  readonly decodes: number;
  /** Items of the prefill kernel. */
  readonly items: number;
  /** Rows whose logits are wanted; 0 where all rows are, in order. */
  readonly chosen: number;
  /** Rows of logits. */
  readonly draws: number;
}

export interface StepPlan {
  readonly counts: StepCounts;
  readonly at: ReturnType<typeof stepOffsets>;
  /** Words written. */
  readonly words: number;
}

export interface PlanLimits extends RowLimits {
  readonly maxRows: number;
  readonly maxSequences: number;
  /** Blocks of the longest sequence. */
  readonly maxBlocks: number;
}

export interface PlanOptions {
  /** Every sequence through the prefill kernel, whose results depend on no other row. */
  readonly batchInvariant: boolean;
  /** Pad to this many sequences of one token each, for a graph. Padding writes no KV and attends to nothing. */
  readonly padTo?: number;
  /** Of these the token is drawn later, from other logits (`CudaSampler`). */
  readonly drawnLater?: (sequence: ScheduledSequence) => boolean;
}

const ITEM_WORDS = 4;
/** struct Draw of kernels/model/sample.cu. */
export const DRAW_WORDS = 5;
/** Items are read 16 bytes at a time. */
const align = (words: number) => Math.ceil(words / ITEM_WORDS) * ITEM_WORDS;

/** In int32 words. */
function stepOffsets({ rows, decodes, items, chosen, draws }: StepCounts) {
  const queryRows = 3 * rows;
  const itemsAt = align(queryRows + 3 * decodes);
  const drawsAt = itemsAt + ITEM_WORDS * items;
  const chosenAt = drawsAt + DRAW_WORDS * draws;
  return {
    tokens: 0,
    positions: rows,
    slots: 2 * rows,
    queryRows,
    contexts: queryRows + decodes,
    tableStarts: queryRows + 2 * decodes,
    items: itemsAt,
    draws: drawsAt,
    chosen: chosenAt,
    tables: chosenAt + chosen,
  };
}

/** Words that the largest step takes. */
export function planCapacity({ maxRows, maxSequences, maxBlocks }: PlanLimits): number {
  const items = maxSequences + Math.ceil(maxRows / PREFILL_ROWS);
  const { tables } = stepOffsets({
    rows: Math.max(maxRows, maxSequences),
    decodes: maxSequences,
    items,
    chosen: maxSequences,
    draws: maxSequences,
  });
  return tables + maxSequences * maxBlocks;
}

interface Item {
  readonly row: number;
  readonly rows: number;
  readonly position: number;
  readonly table: number;
}

/** Fills `target`. Throws INTERNAL for a step that no scheduler should make: what is wrong would be read from or written to anywhere. */
export function planStep(
  target: Int32Array,
  sequences: readonly ScheduledSequence[],
  limits: PlanLimits,
  { batchInvariant, padTo, drawnLater }: PlanOptions,
): StepPlan {
  checkSize(sequences, limits, padTo);
  const single = (sequence: ScheduledSequence) => !batchInvariant && sequence.tokens.length === 1;
  const decodes = sequences.filter(single).length;
  const items = itemsOf(sequences, limits.blockSize, (sequence) => !single(sequence));
  const rows = rowCount(sequences);
  const sampled = sequences.filter(({ sample }) => sample).length;
  const counts: StepCounts =
    padTo === undefined
      ? { rows, decodes, items: items.length, chosen: sampled, draws: sampled }
      : {
          rows: padTo,
          decodes: batchInvariant ? 0 : padTo,
          items: batchInvariant ? padTo : 0,
          chosen: 0,
          draws: padTo,
        };
  const at = stepOffsets(counts);
  target.fill(0, 0, at.tables);
  // padding: no slot, no context
  target.fill(-1, at.slots, at.slots + counts.rows);
  let row = 0;
  let table = 0;
  let decode = 0;
  let chosen = 0;
  const floats = new Float32Array(target.buffer, target.byteOffset, target.length);
  for (const [index, sequence] of sequences.entries()) {
    const { tokens, start, blockTable } = sequence;
    const first = row;
    placeTokens(sequence, limits, (i, token, position, slot) => {
      target[at.tokens + first + i] = token;
      target[at.positions + first + i] = position;
      target[at.slots + first + i] = slot;
    });
    if (single(sequence)) {
      target[at.queryRows + decode] = row;
      target[at.contexts + decode] = start + 1;
      target[at.tableStarts + decode] = table;
      decode++;
    }
    row += tokens.length;
    if (sequence.sample) {
      const drawn = padTo === undefined ? chosen : index;
      if (!drawnLater?.(sequence)) writeDraw(target, floats, at.draws + DRAW_WORDS * drawn, sequence.sample);
      if (padTo === undefined) target[at.chosen + chosen++] = row - 1;
    }
    const blocks = blocksOf(sequence, limits.blockSize);
    target.set(blockTable.subarray(0, blocks), at.tables + table);
    table += blocks;
  }
  // padding still writes a row of zeros: its own
  for (; decode < counts.decodes; decode++) target[at.queryRows + decode] = decode;
  items.forEach((item, i) => {
    target.set([item.row, item.rows, item.position, item.table], at.items + ITEM_WORDS * i);
  });
  return { counts, at, words: at.tables + table };
}

/** A step of `rows` tokens that writes no KV and has no attention: for what is to happen once before anything is served. */
export function planWarmUp(target: Int32Array, rows: number): StepPlan {
  const counts = { rows, decodes: 0, items: 0, chosen: 0, draws: 0 };
  const at = stepOffsets(counts);
  target.fill(0, 0, at.tables);
  target.fill(-1, at.slots, at.slots + rows);
  return { counts, at, words: at.tables };
}

/** True where every sequence has one new token: what graphs are captured for. */
export function isDecodeStep(sequences: readonly ScheduledSequence[]): boolean {
  return sequences.every(({ tokens, promptLogprobs }) => tokens.length === 1 && !promptLogprobs);
}

/** At temperature 0 the zeros stay, and the most likely token is it. `floats` views the same memory as `target`. */
export function writeDraw(
  target: Int32Array,
  floats: Float32Array,
  at: number,
  { params, ...spec }: SampleSpec,
): void {
  if (params.temperature === 0) return;
  floats[at] = 1 / params.temperature;
  target[at + 1] = params.topK;
  floats[at + 2] = params.topP;
  floats[at + 3] = uniform(params.seed, spec.index, spec.outputPosition);
  floats[at + 4] = params.minP ?? 0;
}

/** The most work first, so that the last thread blocks to start are the shortest. */
function itemsOf(
  sequences: readonly ScheduledSequence[],
  blockSize: number,
  wanted: (sequence: ScheduledSequence) => boolean,
): readonly Item[] {
  const items: Item[] = [];
  let row = 0;
  let table = 0;
  for (const sequence of sequences) {
    const { tokens, start } = sequence;
    for (let i = 0; wanted(sequence) && i < tokens.length; i += PREFILL_ROWS) {
      items.push({
        row: row + i,
        rows: Math.min(PREFILL_ROWS, tokens.length - i),
        position: start + i,
        table,
      });
    }
    row += tokens.length;
    table += blocksOf(sequence, blockSize);
  }
  return items.sort((a, b) => b.position + b.rows - (a.position + a.rows));
}

function blocksOf({ start, tokens }: ScheduledSequence, blockSize: number): number {
  return Math.ceil((start + tokens.length) / blockSize);
}

function checkSize(
  sequences: readonly ScheduledSequence[],
  { maxRows, maxSequences, maxBlocks, blockSize }: PlanLimits,
  padTo = sequences.length,
): void {
  const rows = rowCount(sequences);
  const longest = sequences.reduce((most, sequence) => Math.max(most, blocksOf(sequence, blockSize)), 0);
  if (rows > maxRows || sequences.length > maxSequences || padTo < sequences.length || longest > maxBlocks) {
    throw new PdError(
      'INTERNAL',
      `a step of ${sequences.length} sequences, ${rows} tokens and at most ${longest} blocks each does not fit (${maxSequences} sequences, ${maxRows} tokens, ${maxBlocks} blocks)`,
    );
  }
}
