import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { wireShape } from '../../../src/kv/families.ts';
import {
  blockBytes,
  layerBytes,
  type PagedLayout,
  requestKvBytes,
  runBytes,
  runOffset,
  runsPerBlock,
} from '../../../src/kv/layout.ts';
import { forEachPlannedRun, planBlocks } from '../../../src/kv/reblock.ts';
import { tensorBytes } from '../../../src/wire/dtype.ts';

const llama3 = { numBlocks: 100, blockSize: 16, heads: 8, headDim: 128, dtype: 'bfloat16' } as const;
const families = ['kv-first', 'blocks-first', 'mla'] as const;

describe('paged layout', () => {
  test('Llama-3-8B: 4,096 bytes per token and layer, 134 MB for 1,024 tokens', () => {
    const layout: PagedLayout = { ...llama3, family: 'kv-first' };
    expect(blockBytes(layout)).toBe(16 * 4096);
    expect(requestKvBytes(layout, 32, 1024)).toBe(134_217_728);
    expect(requestKvBytes(layout, 32, 1025)).toBe(134_217_728 + 32 * blockBytes(layout));
  });

  test('shapes on the wire, per family', () => {
    expect(wireShape({ ...llama3, family: 'kv-first' }, 3)).toEqual([2, 3, 16, 8, 128]);
    expect(wireShape({ ...llama3, family: 'blocks-first' }, 3)).toEqual([3, 2, 16, 8, 128]);
    expect(wireShape({ ...llama3, family: 'mla', heads: 1, headDim: 576 }, 3)).toEqual([3, 16, 576]);
  });

  test.each(families)(
    '%s: runs tile the cache without gap or overlap, and the shape has its bytes',
    (family) => {
      const layout: PagedLayout = { ...llama3, family, heads: family === 'mla' ? 1 : 8, numBlocks: 5 };
      const offsets: number[] = [];
      for (let block = 0; block < 5; block++) {
        for (let run = 0; run < runsPerBlock(layout); run++) offsets.push(runOffset(layout, 5, block, run));
      }
      offsets.sort((a, b) => a - b);
      expect(offsets).toEqual(offsets.map((_, i) => i * runBytes(layout)));
      expect(offsets.length * runBytes(layout)).toBe(layerBytes(layout));
      expect(tensorBytes(wireShape(layout, 5), layout.dtype)).toBe(layerBytes(layout));
    },
  );

  test.each(families)('%s: blocks that follow one another are one copy', (family) => {
    const layout: PagedLayout = { ...llama3, family, heads: family === 'mla' ? 1 : 8 };
    const copies: number[] = [];
    const plan = planBlocks(layout, Int32Array.of(7, 8, 9, 3, 4, 90));
    forEachPlannedRun(plan, (_cache, _tensor, bytes) => copies.push(bytes));
    const halves = family === 'kv-first' ? 2 : 1;
    const unit = blockBytes(layout) / halves;
    const each = [3, 2, 1].map((blocks) => blocks * unit);
    expect(copies).toEqual(Array.from({ length: halves }, () => each).flat());
  });

  test('property: skipping all blocks copies nothing, and ids of skipped blocks are not looked at', () => {
    fc.assert(
      fc.property(fc.nat(20), (blocks) => {
        const layout: PagedLayout = { ...llama3, family: 'kv-first' };
        expect(planBlocks(layout, new Int32Array(blocks).fill(-1), blocks)).toEqual([]);
      }),
    );
  });
});
