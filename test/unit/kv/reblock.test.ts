import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { HostDevice } from '../../../src/device/host.ts';
import { hostMemory, hostView } from '../../../src/device/memory.ts';
import { formOf, formShape, WIRE_LAYOUTS, type WireForm } from '../../../src/kv/families.ts';
import { layerBytes, type PagedLayout, runBytes, runOffset, runsPerBlock } from '../../../src/kv/layout.ts';
import { checkPlan, forEachPlannedRun, planCopy } from '../../../src/kv/reblock.ts';
import type { Dtype } from '../../../src/wire/dtype.ts';
import { tokenBytes, wireTensor } from '../../../support/wire-kv.ts';

const device = new HostDevice();
const stream = device.createStream();

function memoryOf(bytes: Uint8Array) {
  const memory = hostMemory(bytes.length);
  hostView(memory).set(bytes);
  return memory;
}

const dimensions = fc.record({
  heads: fc.integer({ min: 1, max: 3 }),
  headDim: fc.integer({ min: 1, max: 5 }),
  dtype: fc.constantFrom<Dtype>('uint8', 'bfloat16', 'float32'),
  mla: fc.boolean(),
});
const blockSize = fc.constantFrom(1, 2, 3, 4, 6, 8, 12, 16);

/** A cache, the blocks of one request in it, and a tensor to take from and one to give to. */
const cases = fc
  .record({ dimensions, ours: blockSize, tokens: fc.integer({ min: 1, max: 50 }), spare: fc.nat(6) })
  .chain(({ dimensions: { mla, ...rest }, ours, tokens, spare }) => {
    const needed = Math.ceil(tokens / ours);
    const numBlocks = needed + spare;
    const form: fc.Arbitrary<WireForm> = fc
      .record({ wire: fc.constantFrom(...WIRE_LAYOUTS), size: blockSize, extra: fc.nat(1) })
      .map(({ wire, size, extra }) => {
        if (wire === 'tokens') {
          return { family: mla ? 'mla-tokens' : 'tokens', blocks: tokens, blockSize: 1 };
        }
        const blocks = Math.ceil(tokens / size) + extra;
        return { family: mla ? 'mla' : wire, blocks, blockSize: size };
      });
    return fc.record({
      layout: fc.record({
        family: mla
          ? fc.constant('mla' as const)
          : fc.constantFrom('kv-first' as const, 'blocks-first' as const),
        numBlocks: fc.constant(numBlocks),
        blockSize: fc.constant(ours),
        heads: fc.constant(mla ? 1 : rest.heads),
        headDim: fc.constant(rest.headDim),
        dtype: fc.constant(rest.dtype),
      }),
      blockIds: fc
        .shuffledSubarray(
          Array.from({ length: numBlocks }, (_, i) => i),
          { minLength: needed, maxLength: needed },
        )
        .map((ids) => Int32Array.from(ids)),
      tokens: fc.constant(tokens),
      skipBlocks: fc.nat(needed),
      from: form,
      to: form,
      seed: fc.nat(255),
    });
  });

describe('copy plans', () => {
  test('property: any family to a paged cache to any family is the same KV', () => {
    fc.assert(
      fc.property(cases, ({ layout, blockIds, tokens, from, to, seed }) => {
        const cache = hostMemory(layerBytes(layout));
        const arrived = memoryOf(wireTensor(from, tokens, layout, seed));
        device.reblock('scatter', cache, arrived, planCopy(layout, blockIds, from, { tokens }), stream);
        const sent = memoryOf(wireTensor(to, 0, layout, seed, 0x77));
        device.reblock('gather', cache, sent, planCopy(layout, blockIds, to, { tokens }), stream);
        expect(hostView(sent)).toEqual(wireTensor(to, tokens, layout, seed, 0x77));
      }),
      { numRuns: 300 },
    );
  });

  test('property: exactly the slots of tokens that are not skipped are written, each with its token', () => {
    fc.assert(
      fc.property(cases, ({ layout, blockIds, tokens, skipBlocks, from, seed }) => {
        const { numBlocks, blockSize: size } = layout;
        const cache = memoryOf(new Uint8Array(layerBytes(layout)).fill(0x55));
        const arrived = memoryOf(wireTensor(from, tokens, layout, seed));
        const plan = planCopy(layout, blockIds, from, { tokens, skipBlocks });
        device.reblock('scatter', cache, arrived, plan, stream);
        const expected = new Uint8Array(layerBytes(layout)).fill(0x55);
        for (let token = skipBlocks * size; token < tokens; token++) {
          for (let half = 0; half < runsPerBlock(layout); half++) {
            const bytes = tokenBytes(half, token, layout, seed);
            const run = runOffset(layout, numBlocks, blockIds[Math.floor(token / size)]!, half);
            expected.set(bytes, run + (token % size) * bytes.length);
          }
        }
        expect(hostView(cache)).toEqual(expected);
      }),
      { numRuns: 300 },
    );
  });

  test('a long prompt is few launches, and neighbouring blocks are one run', () => {
    const layout: PagedLayout = {
      family: 'kv-first',
      numBlocks: 4096,
      blockSize: 16,
      heads: 8,
      headDim: 128,
      dtype: 'bfloat16',
    };
    const blockIds = Int32Array.from({ length: 1000 }, (_, i) => i + 100);
    const tokens = 15_990;
    const wholeOf = (form: WireForm) => planCopy(layout, blockIds, form, { tokens });
    expect(wholeOf({ family: 'tokens', blocks: tokens, blockSize: 1 })).toHaveLength(2);
    expect(wholeOf({ family: 'blocks-first', blocks: 1000, blockSize: 16 })).toHaveLength(2);
    expect(wholeOf({ family: 'blocks-first', blocks: 250, blockSize: 64 })).toHaveLength(5);
    const runs: number[] = [];
    const tokensPlan = wholeOf({ family: 'tokens', blocks: tokens, blockSize: 1 });
    forEachPlannedRun(tokensPlan, (_cache, _tensor, bytes) => runs.push(bytes));
    // K and V of the 999 whole blocks, then of the last one
    expect(runs).toEqual([999 * runBytes(layout), 999 * runBytes(layout), 6 * 2048, 6 * 2048]);
  });

  test('blocks, tokens and memory that do not go together are refused before a byte moves', () => {
    const layout: PagedLayout = {
      family: 'kv-first',
      numBlocks: 4,
      blockSize: 4,
      heads: 1,
      headDim: 2,
      dtype: 'uint8',
    };
    const form = formOf(
      { shape: formShape({ family: 'kv-first', blocks: 3, blockSize: 4 }, layout), dtype: 'uint8' },
      { layout, tokens: 9, twoBlocks: 'kv-first' },
    );
    const plan = (ids: number[], tokens: number) => planCopy(layout, Int32Array.from(ids), form, { tokens });
    expect(() => plan([0, 1], 9)).toThrow(/9 tokens do not fit .* 8/);
    expect(() => plan([0, 1, 2, 3], 13)).toThrow(/13 tokens do not fit .* 12/);
    expect(() => plan([0, 1, 4], 9)).toThrow(/block 4 is outside/);
    expect(() => plan([0, -1, 2], 9)).toThrow(/block -1 is outside/);
    const good = plan([0, 1, 3], 12);
    expect(() => checkPlan(good, layerBytes(layout), 48)).not.toThrow();
    expect(() => checkPlan(good, layerBytes(layout) - 1, 48)).toThrow(/copy up to byte/);
    expect(() => checkPlan(good, layerBytes(layout), 47)).toThrow(/copy up to byte/);
    const [cache, tensor] = [hostMemory(layerBytes(layout)), hostMemory(47)];
    expect(() => device.reblock('scatter', cache, tensor, good, stream)).toThrow(/copy up to byte/);
  });
});
