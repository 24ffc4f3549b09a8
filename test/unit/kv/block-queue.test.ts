import fc from 'fast-check';
import { expect, it } from 'vitest';
import { BlockQueue } from '../../../src/kv/block-queue.ts';

it('is a Set of blocks, whatever comes and goes in which order', () => {
  const most = 6;
  const block = fc.integer({ min: 0, max: most - 1 });
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.boolean(), block), { maxLength: 60 }), (changes) => {
      const queue = new BlockQueue(most);
      const set = new Set<number>();
      for (const [comes, one] of changes) {
        if (!comes) {
          queue.delete(one);
          set.delete(one);
        } else if (!set.has(one)) {
          queue.add(one);
          set.add(one);
        }
        expect([queue.size, queue.first, queue.has(one)]).toEqual([set.size, [...set][0], set.has(one)]);
      }
      // from the first to the last
      const order: number[] = [];
      for (let first = queue.first; first !== undefined; first = queue.first) {
        order.push(first);
        queue.delete(first);
      }
      expect(order).toEqual([...set]);
    }),
  );
});
