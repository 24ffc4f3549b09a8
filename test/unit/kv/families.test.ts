import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { PdError } from '../../../src/errors.ts';
import {
  type Destination,
  formOf,
  formShape,
  WIRE_LAYOUTS,
  wireForm,
  wireShape,
} from '../../../src/kv/families.ts';
import type { PagedLayout } from '../../../src/kv/layout.ts';
import type { Dtype } from '../../../src/wire/dtype.ts';

const llama: PagedLayout = {
  family: 'kv-first',
  numBlocks: 100,
  blockSize: 16,
  heads: 8,
  headDim: 128,
  dtype: 'bfloat16',
};
const deepseek: PagedLayout = { ...llama, family: 'mla', heads: 1, headDim: 576 };

function form(shape: number[], given: Partial<Destination> = {}, dtype: Dtype = 'bfloat16') {
  return formOf({ shape, dtype }, { layout: llama, tokens: 20, twoBlocks: 'kv-first', ...given });
}

describe('which family a tensor is', () => {
  test('by rank and by the dimension that is 2', () => {
    expect(form([2, 20, 1024])).toEqual({ family: 'tokens', blocks: 20, blockSize: 1 });
    expect(form([2, 5, 16, 8, 128])).toEqual({ family: 'kv-first', blocks: 5, blockSize: 16 });
    expect(form([2, 1, 32, 8, 128])).toEqual({ family: 'kv-first', blocks: 1, blockSize: 32 });
    expect(form([5, 2, 16, 8, 128])).toEqual({ family: 'blocks-first', blocks: 5, blockSize: 16 });
    expect(form([1, 2, 64, 8, 128])).toEqual({ family: 'blocks-first', blocks: 1, blockSize: 64 });
    expect(form([20, 576], { layout: deepseek })).toEqual({ family: 'mla-tokens', blocks: 20, blockSize: 1 });
    expect(form([2, 16, 576], { layout: deepseek })).toEqual({ family: 'mla', blocks: 2, blockSize: 16 });
  });

  test('two blocks look the same in both families, and what is configured decides', () => {
    expect(form([2, 2, 16, 8, 128])).toEqual({ family: 'kv-first', blocks: 2, blockSize: 16 });
    expect(form([2, 2, 16, 8, 128], { twoBlocks: 'blocks-first' })).toEqual({
      family: 'blocks-first',
      blocks: 2,
      blockSize: 16,
    });
  });

  test('property: what we send is recognised as what it is, whatever the cache of the receiver', () => {
    const cases = fc.record({
      heads: fc.integer({ min: 1, max: 4 }),
      headDim: fc.integer({ min: 1, max: 9 }),
      ours: fc.integer({ min: 1, max: 20 }),
      theirs: fc.integer({ min: 1, max: 20 }),
      family: fc.constantFrom('kv-first' as const, 'blocks-first' as const, 'mla' as const),
      wire: fc.constantFrom(...WIRE_LAYOUTS),
      tokens: fc.integer({ min: 1, max: 70 }),
    });
    fc.assert(
      fc.property(cases, ({ heads, headDim, ours, theirs, family, wire, tokens }) => {
        const layout: PagedLayout = { ...llama, family, heads: family === 'mla' ? 1 : heads, headDim };
        const sent = wireForm({ ...layout, blockSize: theirs }, wire, tokens);
        const shape = formShape(sent, layout);
        const twoBlocks = wire === 'blocks-first' ? wire : 'kv-first';
        const destination = { layout: { ...layout, blockSize: ours }, tokens, twoBlocks } as const;
        expect(formOf({ shape, dtype: 'bfloat16' }, destination)).toEqual(sent);
      }),
    );
  });

  test('the default family of a cache has the shape that the cache announces', () => {
    for (const family of ['kv-first', 'blocks-first', 'mla'] as const) {
      const layout = { ...llama, family, heads: family === 'mla' ? 1 : 8 };
      const wire = family === 'mla' ? 'kv-first' : family;
      expect(formShape(wireForm(layout, wire, 33), layout)).toEqual(wireShape(layout, 3));
    }
  });
});

describe('what cannot fit names both shapes and why', () => {
  const refused: [string, number[], RegExp, Partial<Destination>?, Dtype?][] = [
    ['KV heads', [2, 5, 16, 4, 128], /4 KV heads, the cache 8/],
    ['head size', [2, 5, 16, 8, 64], /64 elements, those of the cache 128/],
    ['width of a token', [2, 20, 512], /512 elements, in the cache 8 x 128/],
    ['dtype', [2, 5, 16, 8, 128], /float32, those of the cache bfloat16/, {}, 'float32'],
    ['FP8 stored as bytes', [2, 5, 16, 8, 128], /uint8, those of the cache bfloat16/, {}, 'uint8'],
    ['too few tokens', [2, 1, 16, 8, 128], /holds 16 tokens, the prompt has 20/],
    ['neither dimension is 2', [3, 5, 16, 8, 128], /no family/],
    ['other ranks', [2, 5, 16, 1024], /no family/],
    ['MLA into K and V', [20, 576], /no family/],
    ['MLA blocks into K and V', [5, 16, 576], /no family/],
    ['K and V into MLA', [2, 5, 16, 8, 128], /2 or 3 dimensions/, { layout: deepseek }],
    ['another latent size', [5, 16, 512], /512 elements, those of the cache 576/, { layout: deepseek }],
  ];
  test.each(refused)('%s', (_, shape, why, given = {}, dtype = 'bfloat16' as const) => {
    let error: unknown;
    try {
      form(shape, given, dtype);
    } catch (caught) {
      error = caught;
    }
    expect(error).toBeInstanceOf(PdError);
    expect((error as PdError).code).toBe('KV_SHAPE_MISMATCH');
    expect((error as PdError).message).toMatch(why);
    expect((error as PdError).message).toContain(`[${shape.join(', ')}] ${dtype}`);
    expect((error as PdError).message).toMatch(
      given.layout ? /\[blocks, 16, 576\] bfloat16/ : /\[2, blocks, 16, 8, 128\]/,
    );
  });
});
