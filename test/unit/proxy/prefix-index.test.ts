import { expect, test } from 'vitest';
import { PrefixIndex } from '../../../src/proxy/prefix-index.ts';

test('what is about to be cached counts as cached', () => {
  const index = new PrefixIndex();
  const coming = new Map([
    ['b', 1],
    ['c', 1],
  ]);
  expect(index.leading('x', ['a', 'b', 'c', 'd'], coming)).toBe(0);
  index.insert('x', ['a'], 10);
  expect(index.leading('x', ['a', 'b', 'c', 'd'], coming)).toBe(3);
  expect(index.leading('x', ['a', 'b', 'c', 'd'])).toBe(1);
});

test('an instance that says it has more than its cache holds is believed as far as that, and all of them as far as memory goes', () => {
  const index = new PrefixIndex(100);
  const keys = (name: string) => Array.from({ length: 40 }, (_, i) => `${name}${i}`);
  index.insert('a', keys('a'), 30);
  expect(index.sizeOf('a')).toBeLessThanOrEqual(30);
  for (const address of ['b', 'c', 'd', 'e']) index.insert(address, keys(address), 1_000);
  expect(index.size).toBeLessThanOrEqual(100);
  index.forget('a');
  expect(index.sizeOf('a')).toBe(0);
});
