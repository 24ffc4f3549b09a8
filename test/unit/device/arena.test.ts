import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ARENA_ALIGNMENT, Arena, type Block } from '../../../src/device/arena.ts';

/** Bytes between two neighbours, or an end, that no block has: the most there is in one piece. */
function longestGap(held: readonly Block[], totalBytes: number): number {
  let longest = 0;
  let end = 0;
  for (const { offset, size } of held.toSorted((a, b) => a.offset - b.offset)) {
    longest = Math.max(longest, offset - end);
    end = offset + size;
  }
  return Math.max(longest, totalBytes - end);
}

describe('arena', () => {
  test('hands out aligned blocks and takes all of them back', () => {
    const arena = new Arena(1000); // 768 usable
    const a = arena.allocate(1)!;
    const b = arena.allocate(257)!;
    expect([a.offset, a.size, b.offset, b.size]).toEqual([0, 256, 256, 512]);
    expect(arena.allocate(1)).toBeUndefined();
    arena.free(a);
    arena.free(b);
    expect([arena.blocks, arena.allocate(768)?.offset]).toEqual([0, 0]);
  });

  test('takes the smallest hole that fits', () => {
    const arena = new Arena(256 * 10);
    const blocks = [4, 1, 2, 1].map((units) => arena.allocate(units * 256)!);
    arena.free(blocks[0]!);
    arena.free(blocks[2]!);
    expect(arena.allocate(2 * 256)!.offset).toBe(blocks[2]!.offset);
  });

  test('a block freed twice, or of another arena, is an error and changes nothing', () => {
    const arena = new Arena(1024);
    const other = new Arena(1024);
    const block = arena.allocate(10)!;
    expect(() => other.free(block)).toThrow(/not held/);
    arena.free(block);
    expect(() => arena.free(block)).toThrow(/not held/);
    expect([arena.blocks, other.blocks, arena.checkIntegrity()]).toEqual([0, 0, []]);
  });

  test('sizes that are no sizes', () => {
    expect(() => new Arena(1024).allocate(-1)).toThrow(/not a number/);
    expect(() => new Arena(1024).allocate(1.5)).toThrow(/not a number/);
    expect(new Arena(0).allocate(1)).toBeUndefined();
    expect(new Arena(1024).allocate(2 ** 50)).toBeUndefined();
  });

  test('property: blocks never overlap, counts are exact, and what fits is given', () => {
    const step = fc.oneof(
      { weight: 3, arbitrary: fc.record({ op: fc.constant('allocate' as const), bytes: fc.nat(4000) }) },
      { weight: 2, arbitrary: fc.record({ op: fc.constant('free' as const), pick: fc.nat() }) },
    );
    fc.assert(
      fc.property(fc.integer({ min: 0, max: 60_000 }), fc.array(step, { maxLength: 200 }), (total, steps) => {
        const arena = new Arena(total);
        const held: Block[] = [];
        for (const step of steps) {
          if (step.op === 'free') {
            const block = held.splice(step.pick % Math.max(held.length, 1), 1)[0];
            if (block) arena.free(block);
          } else {
            const room = longestGap(held, arena.totalBytes);
            const block = arena.allocate(step.bytes);
            const size = Math.max(Math.ceil(step.bytes / ARENA_ALIGNMENT), 1) * ARENA_ALIGNMENT;
            expect(block !== undefined).toBe(size <= room);
            if (block) held.push(block);
          }
          expect(arena.blocks).toBe(held.length);
        }
        expect(arena.checkIntegrity()).toEqual([]);
        const ordered = held.toSorted((a, b) => a.offset - b.offset);
        for (const [i, block] of ordered.entries()) {
          expect(block.offset % ARENA_ALIGNMENT).toBe(0);
          expect(block.offset + block.size).toBeLessThanOrEqual(ordered[i + 1]?.offset ?? arena.totalBytes);
        }
        for (const block of held) arena.free(block);
        expect([arena.blocks, arena.checkIntegrity()]).toEqual([0, []]);
        if (arena.totalBytes > 0) expect(arena.allocate(arena.totalBytes)?.offset).toBe(0);
      }),
    );
  });
});
