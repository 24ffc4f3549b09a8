import { expect, test } from 'vitest';
import type { PagedLayout } from '../../../src/kv/layout.ts';
import { checkSameGeometry, claimsOf, readClaims } from '../../../src/transport/direct/claims.ts';

const LAYOUT: PagedLayout = {
  family: 'kv-first',
  numBlocks: 10,
  blockSize: 16,
  heads: 2,
  headDim: 64,
  dtype: 'bfloat16',
};
const RUN = 16 * 2 * 64 * 2;
const LAYERS = [
  { name: 'a', offset: 0 },
  { name: 'b', offset: 20 * RUN },
];
const claims = claimsOf(LAYOUT, 40 * RUN, LAYERS);
const over = (what: object) => readClaims(JSON.parse(JSON.stringify({ ...claims, ...what })));

test('claims survive the way to the peer, and a memory that just holds them is believed', () => {
  expect(over({})).toEqual(claims);
  const scratch = { offset: 40 * RUN - 512, bytes: 512 };
  const gpu = { busId: '0000:10:00.0', name: 'NVIDIA H200' };
  expect(over({ scratch, gpu, later: 1 })).toEqual({ ...claims, scratch, gpu });
});

test.each([
  ['one byte too few', { bytes: 40 * RUN - 1 }],
  ['one block too many', { blocks: 11 }],
  ['V further away than there is memory', { runStride: 11 * RUN }],
  ['a layer at the end', { layers: [{ name: 'a', offset: 40 * RUN }] }],
  ['blocks on top of each other', { blockStride: RUN - 1 }],
  ['V on top of K', { runStride: 0 }],
  ['sizes near the end of whole numbers', { blockStride: 2 ** 53 - 1 }],
  ['no blocks', { blocks: 0 }],
  ['scratch that ends outside', { scratch: { offset: 40 * RUN - 512, bytes: 513 } }],
])('refused, since a write would land outside: %s', (_, what) => {
  expect(() => over(what)).toThrow(expect.objectContaining({ code: 'DIRECT_REFUSED' }));
});

test.each([
  ['runs', { runs: 3 }],
  ['bytes', { bytes: -1 }],
  ['blocks', { blocks: 1.5 }],
  ['dtype', { dtype: 'x'.repeat(257) }],
  ['layers', { layers: [] }],
  ['layers', { layers: Array.from({ length: 1_025 }, () => LAYERS[0]) }],
  ['offset', { layers: [{ name: 'a', offset: '0' }] }],
  ['scratch', { scratch: 5 }],
  ['busId', { gpu: { name: 'a' } }],
])('not read, by name: %s', (name, what) => {
  expect(() => over(what)).toThrow(
    expect.objectContaining({ code: 'MESSAGE_INVALID', message: expect.stringContaining(name) }),
  );
});

test('numbers of blocks and families may differ between the ends, geometry may not', () => {
  const of = (layout: Partial<PagedLayout>, layers = LAYERS) =>
    claimsOf({ ...LAYOUT, ...layout }, 2 ** 40, layers);
  checkSameGeometry(claims, of({ numBlocks: 999, family: 'blocks-first' }));
  for (const [what, theirs] of [
    ['blockSize is 32 there and 16 here', of({ blockSize: 32 })],
    ['headDim is 32 there and 64 here', of({ headDim: 32 })],
    ['dtype is float16 there and bfloat16 here', of({ dtype: 'float16' })],
    ['runs is 1 there and 2 here', of({ family: 'mla' })],
    ['1 layers there, 2 here', of({}, LAYERS.slice(1))],
    ['layer 1 is c there and b here', of({}, [LAYERS[0]!, { name: 'c', offset: 0 }])],
  ] as const) {
    expect(() => checkSameGeometry(claims, theirs)).toThrow(what);
  }
});
