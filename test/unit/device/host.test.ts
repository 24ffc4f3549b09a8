import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { createDevice } from '../../../src/device/create-device.ts';
import { HostDevice } from '../../../src/device/host.ts';
import { hostMemory, hostView, sliceMemory, totalBytes } from '../../../src/device/memory.ts';
import { wireShape } from '../../../src/kv/families.ts';
import {
  layerBytes,
  type PagedLayout,
  requestKvBytes,
  runBytes,
  runOffset,
  runsPerBlock,
} from '../../../src/kv/layout.ts';
import { type Dtype, tensorBytes } from '../../../src/wire/dtype.ts';

const device = new HostDevice();
const stream = device.createStream();

const layoutArb: fc.Arbitrary<PagedLayout> = fc
  .record({
    family: fc.constantFrom('kv-first', 'blocks-first', 'mla'),
    numBlocks: fc.integer({ min: 1, max: 12 }),
    blockSize: fc.integer({ min: 1, max: 4 }),
    heads: fc.integer({ min: 1, max: 3 }),
    headDim: fc.integer({ min: 1, max: 5 }),
    dtype: fc.constantFrom<Dtype>('uint8', 'bfloat16', 'float32'),
  })
  .map((layout) => (layout.family === 'mla' ? { ...layout, heads: 1 } : layout));

const caseArb = layoutArb.chain((layout) =>
  fc.record({
    layout: fc.constant(layout),
    blockIds: fc
      .shuffledSubarray(Array.from({ length: layout.numBlocks }, (_, i) => i))
      .map((ids) => Int32Array.from(ids)),
    skip: fc.nat(layout.numBlocks),
  }),
);

function filled(bytes: number, seed: number): ReturnType<typeof hostMemory> {
  const memory = hostMemory(bytes);
  const view = hostView(memory);
  for (let i = 0; i < bytes; i++) view[i] = (i * 31 + seed) & 0xff;
  return memory;
}

describe('host device', () => {
  test('property: gather and scatter move what one run at a time would', () => {
    fc.assert(
      fc.property(caseArb, ({ layout, blockIds, skip }) => {
        const n = blockIds.length;
        const bytes = tensorBytes(wireShape(layout, n), layout.dtype);
        expect(bytes).toBe(requestKvBytes(layout, 1, n * layout.blockSize));
        const layer = { memory: filled(layerBytes(layout), 1), layout };
        const tensor = hostMemory(bytes);
        device.gather(tensor, layer, blockIds, stream);

        const cache = hostView(layer.memory);
        const wanted = new Uint8Array(bytes);
        const run = runBytes(layout);
        blockIds.forEach((id, i) => {
          for (let r = 0; r < runsPerBlock(layout); r++) {
            const from = runOffset(layout, layout.numBlocks, id, r);
            wanted.set(cache.subarray(from, from + run), runOffset(layout, n, i, r));
          }
        });
        expect(Buffer.from(hostView(tensor)).equals(Buffer.from(wanted))).toBe(true);

        // Into another cache: blocks from `skip` on are written, every other byte stays as it was.
        const target = { memory: filled(layerBytes(layout), 7), layout };
        const expected = Uint8Array.from(hostView(target.memory));
        blockIds.forEach((id, i) => {
          if (i < skip) return;
          for (let r = 0; r < runsPerBlock(layout); r++) {
            const at = runOffset(layout, n, i, r);
            expected.set(wanted.subarray(at, at + run), runOffset(layout, layout.numBlocks, id, r));
          }
        });
        device.scatter(target, blockIds, tensor, stream, skip);
        expect(Buffer.from(hostView(target.memory)).equals(Buffer.from(expected))).toBe(true);
      }),
    );
  });

  test('a tensor of the wrong size and a block outside of the cache are errors, and nothing is written', () => {
    const layout: PagedLayout = {
      family: 'kv-first',
      numBlocks: 4,
      blockSize: 2,
      heads: 1,
      headDim: 4,
      dtype: 'float32',
    };
    const layer = { memory: hostMemory(layerBytes(layout)), layout };
    const bytes = tensorBytes(wireShape(layout, 2), 'float32');
    const source = filled(bytes, 3);
    expect(() => device.scatter(layer, Int32Array.of(1, 4), source, stream)).toThrow(/block 4/);
    expect(() => device.scatter(layer, Int32Array.of(-1, 1), source, stream)).toThrow(/block -1/);
    expect(() => device.scatter(layer, Int32Array.of(1), source, stream)).toThrow(/1 blocks take/);
    expect(hostView(layer.memory).every((byte) => byte === 0)).toBe(true);
    expect(() =>
      device.gather(source, { ...layer, memory: hostMemory(16) }, Int32Array.of(0, 1), stream),
    ).toThrow(/the layer takes/);
  });

  test('copy moves bytes between slices of the same and of other memory', () => {
    const memory = filled(16, 0);
    const copy = hostMemory(4);
    device.copy(copy, sliceMemory(memory, 4, 4), stream);
    expect([...device.view(copy)]).toEqual([...device.view(memory).subarray(4, 8)]);
    expect(() => device.copy(copy, memory, stream)).toThrow(/copy of 16 bytes into 4/);
  });

  test('work is done when the call returns', () => {
    const event = stream.record();
    expect(event.done()).toBe(true);
    stream.wait(event.ref);
    expect(() => stream.wait({ kind: 'cuda', handle: 1n })).toThrow(/host stream/);
    event.dispose();
    event.dispose();
  });

  test('memory that cannot be had is an error with the size', () => {
    expect(() => device.allocate(2 ** 52, 'KV cache')).toThrow(/KV cache: 4503599627370496 bytes/);
  });

  test('devices by name', async () => {
    expect((await createDevice('host')).name).toBe('host');
    await expect(createDevice('gpu')).rejects.toMatchObject({ code: 'CONFIG_INVALID' });
    await expect(createDevice('cuda:x')).rejects.toMatchObject({ code: 'CONFIG_INVALID' });
  });
});

describe('memory', () => {
  test('slices of slices, by pointer and by offset', () => {
    const host = hostMemory(100);
    expect(sliceMemory(sliceMemory(host, 10, 50), 5, 5)).toEqual({ ...host, offset: 15, bytes: 5 });
    const cuda = { kind: 'cuda', device: 1, pointer: 1000n as never, bytes: 100 } as const;
    expect(sliceMemory(cuda, 10, 50)).toEqual({ ...cuda, pointer: 1010n, bytes: 50 });
    expect(totalBytes([host, cuda])).toBe(200);
    expect(() => hostView(cuda)).toThrow(/cuda memory/);
  });

  test.each([
    [-1, 1],
    [0, 101],
    [100, 1],
    [0.5, 1],
    [0, -1],
  ])('a slice %d+%d outside is an error', (offset, length) => {
    expect(() => sliceMemory(hostMemory(100), offset, length)).toThrow(/outside/);
  });
});
