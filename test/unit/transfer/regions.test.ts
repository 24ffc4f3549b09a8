/** Both ends of a bundle cut it into the same regions, whatever is refused and however each has it in memory. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { hostMemory, sliceMemory } from '../../../src/device/memory.ts';
import { regionsOf, runsOf, runsOfTaken } from '../../../src/transfer/frozen/regions.ts';

const area = hostMemory(1 << 20);

/** Tensors of these sizes; those with a gap do not touch the one before. */
function place(tensors: readonly { readonly bytes: number; readonly gap: boolean }[]) {
  let at = 0;
  return tensors.map(({ bytes, gap }) => {
    if (gap) at += 16;
    at += bytes;
    return sliceMemory(area, at - bytes, bytes);
  });
}

describe('regions', () => {
  it('join neighbours as far as both ends have them', () => {
    const memory = place([10, 20, 30, 40].map((bytes) => ({ bytes, gap: false })));
    expect(runsOf(memory)).toEqual([4]);
    expect(regionsOf(memory, [[4], [4]]).map(({ bytes }) => bytes)).toEqual([100]);
    expect(regionsOf(memory, [[4], [1, 3]]).map(({ bytes }) => bytes)).toEqual([10, 90]);
    expect(regionsOf(memory, [[4], [4]], [false, false, true, false]).map(({ bytes }) => bytes)).toEqual([
      30, 30, 40,
    ]);
  });

  it('are never made of tensors that do not touch', () => {
    const memory = place([10, 20].map((bytes) => ({ bytes, gap: true })));
    expect(runsOf(memory)).toEqual([1, 1]);
    expect(() => regionsOf(memory, [[2]])).toThrow(/touch/);
  });

  it('property: are equal on both ends and cover every tensor that is taken, in order', () => {
    const tensor = fc.record({
      bytes: fc.integer({ min: 1, max: 600 }),
      senderGap: fc.boolean(),
      receiverGap: fc.boolean(),
      taken: fc.boolean(),
      alone: fc.boolean(),
    });
    fc.assert(
      fc.property(fc.array(tensor, { minLength: 1, maxLength: 30 }), (tensors) => {
        const taken = tensors.map((one) => one.taken);
        const sender = place(tensors.map(({ bytes, senderGap }) => ({ bytes, gap: senderGap })));
        const announced = runsOf(sender);
        const kept = tensors.filter((one) => one.taken);
        const alone = kept.map((one) => one.alone);
        const receiver = place(kept.map(({ bytes, receiverGap }) => ({ bytes, gap: receiverGap })));
        const answered = runsOf(receiver);
        const runs = [runsOfTaken(announced, taken), answered];
        const sent = regionsOf(
          sender.filter((_, index) => taken[index]),
          runs,
          alone,
        );
        const received = regionsOf(receiver, runs, alone);
        expect(sent.map(({ bytes }) => bytes)).toEqual(received.map(({ bytes }) => bytes));
        const bytes = sent.reduce((sum, region) => sum + region.bytes, 0);
        expect(bytes).toBe(kept.reduce((sum, one) => sum + one.bytes, 0));
      }),
    );
  });
});
