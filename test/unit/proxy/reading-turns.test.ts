import { setImmediate } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { ReadingTurns } from '../../../src/proxy/reading-turns.ts';

test('bodies that come together are read in several turns of the event loop, each in its order', async () => {
  const turns = new ReadingTurns();
  const begun: number[] = [];
  const all = Array.from({ length: 40 }, async (_, at) => {
    await turns.begin(1_000);
    begun.push(at);
  });
  const counts: number[] = [];
  while (begun.length < all.length) {
    const before = begun.length;
    await setImmediate();
    counts.push(begun.length - before);
  }
  await Promise.all(all);
  expect(begun).toEqual(all.map((_, at) => at));
  expect(Math.max(...counts)).toBeLessThanOrEqual(16);
});

test('one that comes alone is read at once, whatever its length, and so is the next after a turn', async () => {
  const turns = new ReadingTurns();
  expect(turns.begin(2 ** 20)).toBeUndefined();
  expect(turns.begin(1)).toBeInstanceOf(Promise);
  for (let i = 0; i < 4; i++) await setImmediate();
  expect(turns.begin(1)).toBeUndefined();
});
