import { expect, test } from 'vitest';
import {
  layersPerWrite,
  MAX_LAYERS_PER_WRITE,
  unitsPerRun,
  WRITE_PARAMETER_BYTES,
  writeElement,
  writeParameterBlock,
  writeTable,
} from '../../../src/device/cuda/paged-write.ts';

const STRIDES = { runBytes: 4_096, runs: 2, blockStride: 4_096, runStride: 409_600 } as const;
const at = (source: bigint, target: bigint) => [{ source, target }];

test('16 bytes at a time only where every address and stride of both ends allows it', () => {
  expect(writeElement(STRIDES, STRIDES, at(32n, 512n))).toBe(16);
  expect(writeElement(STRIDES, STRIDES, at(32n, 513n))).toBe(1);
  expect(writeElement(STRIDES, { ...STRIDES, runStride: 409_608 }, at(32n, 512n))).toBe(1);
  expect(writeElement({ ...STRIDES, runBytes: 24 }, STRIDES, at(32n, 512n))).toBe(1);
});

test('a launch takes what its table and 32-bit counts hold, and refuses what not even one layer fits', () => {
  expect(unitsPerRun(4_097, 16)).toBe(2);
  expect(layersPerWrite(1_025, STRIDES, 16)).toBe(MAX_LAYERS_PER_WRITE);
  expect(layersPerWrite(2 ** 20, { ...STRIDES, runBytes: 2 ** 20 }, 16)).toBe(3);
  expect(() => layersPerWrite(2 ** 28, { ...STRIDES, runBytes: 2 ** 20 }, 16)).toThrow(
    expect.objectContaining({ code: 'LIMIT_EXCEEDED' }),
  );
});

test('the parameter block has every value where the kernel looks for it', () => {
  const view = new DataView(new ArrayBuffer(WRITE_PARAMETER_BYTES));
  const write = {
    source: STRIDES,
    target: { ...STRIDES, blockStride: 8_192, runStride: 4_096 },
    table: writeTable(
      Array.from({ length: MAX_LAYERS_PER_WRITE }, (_, i) => ({
        source: BigInt(1_000 + i),
        target: BigInt(2_000 + i),
      })),
    ),
    sourceIds: 11n,
    targetIds: 12n,
    blocks: 7,
    sourceBlocks: 100,
    targetBlocks: 200,
    grant: 13n,
    seq: 14n,
    marks: 15n,
    flag: 16n,
    counter: 17n,
  };
  writeParameterBlock(view, write, 16);
  const words = Array.from({ length: 12 }, (_, i) => Number(view.getBigUint64(8 * i, true)));
  expect(words).toEqual([4_096, 409_600, 8_192, 4_096, 4_096, 11, 12, 13, 14, 15, 16, 17]);
  const counts = Array.from({ length: 6 }, (_, i) => view.getUint32(96 + 4 * i, true));
  expect(counts).toEqual([MAX_LAYERS_PER_WRITE, 7, 2, 1, 100, 200]);
  expect(view.getBigUint64(120 + 16 * 127, true)).toBe(1_127n);
  expect(view.getBigUint64(120 + 16 * 127 + 8, true)).toBe(2_127n);
});
