import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  type PlanLimits,
  type PlanOptions,
  planCapacity,
  planStep,
} from '../../../../src/model/cuda/step-plan.ts';
import type { ScheduledSequence } from '../../../../src/scheduler/types.ts';
import { sequenceOf } from '../../../support/batches.ts';

const LIMITS: PlanLimits = {
  maxRows: 600,
  maxSequences: 12,
  maxBlocks: 64,
  blockSize: 16,
  numBlocks: 700,
  vocab: 100,
};

const sequences: fc.Arbitrary<ScheduledSequence[]> = fc
  .array(
    fc.record({
      start: fc.nat(400),
      count: fc.oneof(fc.constant(1), fc.integer({ min: 1, max: 300 })),
      sampled: fc.boolean(),
      seed: fc.nat(),
    }),
    { maxLength: 12 },
  )
  .map((all) => {
    let left = LIMITS.maxRows;
    return all.flatMap(({ start, count, sampled, seed }, i) => {
      const rows = Math.min(count, left);
      left -= rows;
      if (rows === 0) return [];
      const tokens = Array.from({ length: rows }, (_, k) => (seed + k) % LIMITS.vocab);
      const blocks = Array.from({ length: Math.ceil((start + rows) / 16) }, (_, k) => (seed + 7 * k) % 700);
      return [sequenceOf({ id: `${i}`, tokens, start, blocks, ...(sampled && { position: 0 }) })];
    });
  });

function plan(all: readonly ScheduledSequence[], options: PlanOptions) {
  const words = new Int32Array(planCapacity(LIMITS)).fill(-9);
  return planStep(words, all, LIMITS, options);
}

describe('a step plan', () => {
  it('gives every token its slot, and to exactly one attention kernel, with all that came before it', () => {
    fc.assert(
      fc.property(sequences, fc.boolean(), (all, batchInvariant) => {
        const words = new Int32Array(planCapacity(LIMITS)).fill(-9);
        const { at, counts } = planStep(words, all, LIMITS, { batchInvariant });
        const slotAt = (table: number, position: number) =>
          words[at.tables + table + Math.floor(position / 16)]! * 16 + (position % 16);
        const covered = new Map<number, { table: number; position: number }>();
        for (let i = 0; i < counts.items; i++) {
          const [row, rows, position, table] = words.subarray(at.items + 4 * i, at.items + 4 * i + 4);
          expect(rows).toBeLessThanOrEqual(128);
          const known = covered.size;
          for (let k = 0; k < rows!; k++) covered.set(row! + k, { table: table!, position: position! + k });
          expect(covered.size).toBe(known + rows!);
        }
        for (let i = 0; i < counts.decodes; i++) {
          const row = words[at.queryRows + i]!;
          expect(covered.has(row)).toBe(false);
          covered.set(row, { table: words[at.tableStarts + i]!, position: words[at.contexts + i]! - 1 });
        }
        let row = 0;
        // one expectation for all rows: hundreds of thousands of them would take seconds
        const wrong: string[] = [];
        const check = (what: string, got: number | undefined, wanted: number | undefined) => {
          if (got !== wanted) wrong.push(`row ${row}: ${what} ${got} is not ${wanted}`);
        };
        for (const { tokens, start, blockTable } of all) {
          for (let i = 0; i < tokens.length; i++, row++) {
            check('token', words[at.tokens + row], tokens[i]);
            check('position', words[at.positions + row], start + i);
            const { table, position } = covered.get(row)!;
            check('covered position', position, start + i);
            check('slot', words[at.slots + row], slotAt(table, position));
            for (let block = 0; block * 16 <= position; block++) {
              check(`block ${block}`, words[at.tables + table + block], blockTable[block]);
            }
          }
        }
        expect(wrong).toEqual([]);
        expect(covered.size).toBe(row);
        expect(at.items % 4).toBe(0);
        let last = -1;
        const ends = all.flatMap(({ tokens, sample }) => {
          last += tokens.length;
          return sample ? [last] : [];
        });
        expect([...words.subarray(at.chosen, at.chosen + counts.chosen)]).toEqual(ends);
      }),
      { numRuns: 60 },
    );
  });

  it.each([false, true])(
    'pads to a graph whose parts lie where they lay (invariant %s)',
    (batchInvariant) => {
      const one = sequenceOf({ tokens: [5], start: 20, blocks: [3, 4] });
      const empty = plan([], { batchInvariant, padTo: 6 });
      const full = plan([one, one, one], { batchInvariant, padTo: 6 });
      expect(full.at).toEqual(empty.at);
      expect(full.counts).toEqual(empty.counts);
      const words = new Int32Array(planCapacity(LIMITS));
      const { at } = planStep(words, [one, one, one], LIMITS, { batchInvariant, padTo: 6 });
      const part = (from: number) => [...words.subarray(from, from + 6)];
      expect(part(at.slots)).toEqual([68, 68, 68, -1, -1, -1]);
      if (batchInvariant) return;
      expect(part(at.contexts)).toEqual([21, 21, 21, 0, 0, 0]);
      // each padded row writes its zeros to itself
      expect(part(at.queryRows)).toEqual([0, 1, 2, 3, 4, 5]);
    },
  );

  it.each([
    [
      'a token outside of the vocabulary',
      sequenceOf({ tokens: [100], blocks: [1] }),
      /token 100 at position 0/,
    ],
    [
      'a position without a block',
      sequenceOf({ tokens: [1, 2], start: 15, blocks: [1] }),
      /position 16 has no block/,
    ],
    ['a block outside of the cache', sequenceOf({ tokens: [1], blocks: [700] }), /position 0 has no block/],
    [
      'more rows than there is memory for',
      sequenceOf({ tokens: Array(601).fill(1), blocks: [1] }),
      /601 tokens/,
    ],
  ])('refuses %s', (_, sequence, message) => {
    expect(() => plan([sequence], { batchInvariant: false })).toThrow(message);
  });
});
