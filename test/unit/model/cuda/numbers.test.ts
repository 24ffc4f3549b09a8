import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { graphSizes } from '../../../../src/model/cuda/graphs.ts';
import { blocksThatFit } from '../../../../src/model/cuda/sizes.ts';
import {
  bfloat16ToFloat32,
  float16ToFloat32,
  float32ToBfloat16,
  float32ToFloat16,
} from '../../../../src/model/float-convert.ts';

function both(to: (source: Float32Array, target: Uint16Array) => void, value: number): number {
  const bits = new Uint16Array(1);
  to(Float32Array.of(value), bits);
  return bits[0]!;
}

describe('float32 to 16 bits', () => {
  it.each([
    ['float16', float32ToFloat16, float16ToFloat32],
    ['bfloat16', float32ToBfloat16, bfloat16ToFloat32],
  ] as const)('%s: every number of the type stays itself, any other goes to the nearest', (_, to, from) => {
    const all = new Float32Array(65_536);
    from(
      Uint16Array.from({ length: 65_536 }, (_, i) => i),
      all,
    );
    const back = new Uint16Array(65_536);
    to(all, back);
    const changed = Array.from(back.keys()).filter((bits) => !Number.isNaN(all[bits]) && back[bits] !== bits);
    expect(changed).toEqual([]);
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 0x7bfe }),
        fc.double({ min: 0, max: 1, noNaN: true }),
        (bits, share) => {
          const [low, high] = [all[bits]!, all[bits + 1]!];
          if (!Number.isFinite(high)) return;
          const value = Math.fround(low + (high - low) * share);
          const got = both(to, value);
          const middle = (low + high) / 2;
          if (value < middle) expect(got).toBe(bits);
          else if (value > middle) expect(got).toBe(bits + 1);
          else expect(got % 2).toBe(0);
          expect(both(to, -value)).toBe(got | 0x8000);
        },
      ),
    );
  });

  it('keeps NaN and infinity, and overflows float16 to infinity', () => {
    expect(both(float32ToFloat16, Number.NaN) & 0x3ff).not.toBe(0);
    expect(both(float32ToBfloat16, Number.NaN) & 0x7f).not.toBe(0);
    expect(both(float32ToFloat16, 1e6)).toBe(0x7c00);
    expect(both(float32ToFloat16, 65_519)).toBe(0x7bff);
    expect(both(float32ToBfloat16, Number.NEGATIVE_INFINITY)).toBe(0xff80);
  });
});

describe('memory', () => {
  const budget = {
    total: 80e9,
    free: 60e9,
    utilization: 0.9,
    sharers: 1,
    reserved: 2e9,
    blockBytes: 2e6,
    perSequence: 1_000,
    model: 'llama',
    device: 'cuda:0',
  };

  it('leaves what others hold, what is reserved and the share that is not to be filled', () => {
    expect(blocksThatFit(budget)).toBe(25_000);
  });

  it('is divided among workers that share a GPU', () => {
    const own = { ...budget, free: 70e9, sharers: 2, reserved: 0 };
    expect(blocksThatFit(own)).toBe((36e9 - 10e9) / 2e6);
    expect(() => blocksThatFit({ ...own, sharers: 8 })).toThrow(
      /--gpu-memory-utilization 0\.9 for 8 workers/,
    );
  });

  it('says by how much one sequence is too long', () => {
    expect(() => blocksThatFit({ ...budget, perSequence: 26_000 })).toThrow(
      /llama does not fit.*48\.4 GiB of KV, 46\.6 GiB of cuda:0 are left.*1\.86 GiB too little/s,
    );
  });
});

describe('graph sizes', () => {
  it.each([
    [1, [1]],
    [5, [1, 2, 4, 5]],
    [16, [1, 2, 4, 6, 8, 12, 16]],
  ])('for %i sequences', (most, sizes) => {
    expect(graphSizes(most)).toEqual(sizes);
  });
});
