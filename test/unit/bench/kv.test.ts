/** The benchmark's check must see every way in which KV can arrive wrong; else its numbers mean nothing. */
import fc from 'fast-check';
import { beforeEach, expect, test } from 'vitest';
import { JobMaker } from '../../../bench/transfer/bench.ts';
import { BenchKv } from '../../../bench/transfer/kv.ts';
import { blockTable, type KvShape } from '../../../bench/transfer/shape.ts';
import { HostDevice } from '../../../src/device/host.ts';
import { hostMemory, hostView } from '../../../src/device/memory.ts';
import { EventPoller } from '../../../src/device/poller.ts';
import { blockBytes, runBytes, runOffset } from '../../../src/kv/layout.ts';

const SHAPE: KvShape = {
  model: 'test',
  layers: 3,
  family: 'kv-first',
  heads: 2,
  headDim: 8,
  dtype: 'bfloat16',
  blockSize: 4,
};
const TOKENS = 30;
const device = new HostDevice();
const stream = device.createStream();
let jobs: JobMaker;

beforeEach(() => {
  jobs = new JobMaker('t', SHAPE);
});

async function holder() {
  const sample = new JobMaker('sample', SHAPE).paged(TOKENS);
  return BenchKv.create(device, SHAPE, new EventPoller(), {
    areaBytes: BenchKv.areaBytes(SHAPE, sample),
    largestBytes: BenchKv.largestBytes(SHAPE, sample),
  });
}

/** Source to target as an engine does it, right in every byte. */
async function moved() {
  const job = jobs.paged(TOKENS);
  const [source, target] = [await holder(), await holder()];
  await source.fill(job, 'source');
  await target.fill(job, 'target');
  const layers = source.layers(job, 'source').map(({ target: from }, i) => {
    const to = target.layers(job, 'target')[i]!.target;
    const ids = source.blockIds(job, 'source');
    const tensor = hostMemory(blockBytes(from.layout) * ids.length);
    device.gather(tensor, from, ids, stream);
    device.scatter(to, target.blockIds(job, 'target'), tensor, stream);
    return to;
  });
  return { job, target, layers };
}

test('KV that arrived right is right, in every byte of every layer', async () => {
  const { job, target, layers } = await moved();
  const bytes = layers.reduce((sum, layer) => sum + layer.memory.bytes, 0);
  expect(await target.checkPaged(job)).toEqual({ bytes });
});

test('one wrong byte anywhere is seen, in blocks of the request and in those between', async () => {
  const { job, target, layers } = await moved();
  const size = layers[0]!.memory.bytes;
  await fc.assert(
    fc.asyncProperty(
      fc.nat(SHAPE.layers - 1),
      fc.nat(size - 1),
      fc.integer({ min: 1, max: 255 }),
      async (at, byte, flip) => {
        const view = hostView(layers[at]!.memory);
        view[byte]! ^= flip;
        const { wrong } = await target.checkPaged(job);
        view[byte]! ^= flip;
        expect(wrong).toContain(`layer ${at}`);
      },
    ),
    { numRuns: 60 },
  );
  expect((await target.checkPaged(job)).wrong).toBeUndefined();
});

test('blocks, K and V, layers and rounds in the wrong place are seen', async () => {
  const { job, target, layers } = await moved();
  const { layout } = layers[0]!;
  const ids = target.blockIds(job, 'target');
  const run = (layer: number, block: number, kv: number) =>
    hostView(layers[layer]!.memory)
      .subarray(runOffset(layout, layout.numBlocks, block, kv))
      .subarray(0, runBytes(layout));
  const exchanged = async (a: Uint8Array, b: Uint8Array) => {
    const swap = () => {
      const kept = a.slice();
      a.set(b);
      b.set(kept);
    };
    swap();
    const { wrong } = await target.checkPaged(job);
    swap();
    return wrong;
  };
  expect(await exchanged(run(0, ids[0]!, 0), run(0, ids[1]!, 0))).toContain(job.id);
  expect(await exchanged(run(0, ids[0]!, 0), run(0, ids[0]!, 1))).toContain(job.id);
  expect(await exchanged(run(0, ids[0]!, 0), run(2, ids[0]!, 0))).toContain(job.id);
  expect((await target.checkPaged(jobs.paged(TOKENS))).wrong).toContain('layer 0');
});

test('requests of a row go to caches of their own, from and to other blocks', async () => {
  const row = jobs.row(jobs.paged(TOKENS), 3);
  const kv = await BenchKv.create(device, SHAPE, new EventPoller(), {
    areaBytes: Math.max(...row.map((job) => BenchKv.areaBytes(SHAPE, job))),
    largestBytes: 4_000,
  });
  const places = row.map((job) => kv.layers(job, 'target').map(({ target }) => target.memory));
  const offsets = places.flat().map((memory) => (memory.kind === 'host' ? memory.offset : -1));
  expect(new Set(offsets).size).toBe(3 * SHAPE.layers);
  expect(row.map((job) => kv.layers(job, 'source')[0]!.target.memory)).toEqual(Array(3).fill(places[0]![0]));
  for (const side of ['source', 'target'] as const) {
    expect(new Set(row.map((job) => kv.blockIds(job, side).join())).size).toBe(3);
  }
});

test('flat tensors: order, number and size are seen', async () => {
  const job = jobs.flat(4, 1_001);
  const source = await holder();
  await source.fill(job, 'source');
  const tensors = [0, 1, 2, 3].map((i) => source.flat(job, i));
  expect(await source.checkFlat(job, tensors)).toEqual({ bytes: 4_004 });
  expect((await source.checkFlat(job, [...tensors].reverse())).wrong).toContain('tensor 0');
  expect((await source.checkFlat(job, tensors.slice(1))).wrong).toContain('3 tensors');
  expect((await source.checkFlat(job, [...tensors.slice(0, 3), hostMemory(1_000)])).wrong).toContain(
    '1000 bytes',
  );
});

test('checks that run at once do not disturb each other', async () => {
  const source = await holder();
  const job = jobs.flat(4, 1_001);
  await source.fill(job, 'source');
  const tensors = [0, 1, 2, 3].map((i) => source.flat(job, i));
  const results = await Promise.all(Array.from({ length: 8 }, () => source.checkFlat(job, tensors)));
  for (const result of results) expect(result.wrong).toBeUndefined();
});

test('a block table is the same for a seed everywhere, and names no block twice', () => {
  fc.assert(
    fc.property(fc.nat(1_000), fc.integer({ min: 1, max: 200 }), fc.nat(50), (seed, count, more) => {
      const table = blockTable(seed, count, count + more);
      expect(table).toEqual(blockTable(seed, count, count + more));
      expect(new Set(table).size).toBe(count);
      expect(Math.max(...table)).toBeLessThan(count + more);
    }),
  );
  expect(blockTable(1, 50, 60)).not.toEqual(blockTable(2, 50, 60));
});
