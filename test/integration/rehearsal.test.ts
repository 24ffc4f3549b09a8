/** What a worker hands over to itself at its start: to the end, and whatever the shape of its cache. */
import { expect, test } from 'vitest';
import { rehearse } from '../../src/transfer/native/rehearsal.ts';

test.each([
  ['a small cache', { blocks: 4, blockSize: 1, layers: 1 }],
  ['a large one', { blocks: 10_000, blockSize: 32, layers: 80 }],
])('%s', async (_, sizes) => {
  expect(await rehearse({ ...sizes, blockBytes: 1_024, family: 'kv-first' })).toBeGreaterThan(0);
});
