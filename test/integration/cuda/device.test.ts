import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import type { CudaDevice } from '../../../src/device/cuda/device.ts';
import type { CudaStream } from '../../../src/device/cuda/stream.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import { HostDevice } from '../../../src/device/host.ts';
import { hostMemory, hostView, sliceMemory } from '../../../src/device/memory.ts';
import { EventPoller } from '../../../src/device/poller.ts';
import { blockBytes, layerBytes, type PagedLayout } from '../../../src/kv/layout.ts';
import { DTYPE_BYTES, type Dtype } from '../../../src/wire/dtype.ts';
import { type StandIns, useStandIns } from '../../stand-ins/build.ts';

let standIns: StandIns;
let device: CudaDevice;
let stream: CudaStream;
const poller = new EventPoller();

const drained = async () => {
  const event = stream.record();
  await poller.wait(event, 60_000, 'test');
  event.dispose();
};

beforeAll(async () => {
  standIns = useStandIns();
  device = await createCudaDevice(1);
  stream = device.createStream();
});
afterEach(() => standIns.faults(''));
afterAll(() => {
  stream.dispose();
  device.dispose();
  device.dispose();
});

/** Bytes into GPU memory and back, by way of pageable memory: the copies wait. */
function upload(bytes: Uint8Array, offset = 0) {
  const memory = sliceMemory(device.allocate(bytes.length + offset, 'test'), offset, bytes.length);
  const host = hostMemory(bytes.length);
  hostView(host).set(bytes);
  device.copy(memory, host, stream);
  return memory;
}
function download(memory: ReturnType<typeof upload>): Uint8Array {
  const host = hostMemory(memory.bytes);
  device.copy(host, memory, stream);
  return hostView(host);
}

const layouts: fc.Arbitrary<PagedLayout> = fc.record({
  family: fc.constantFrom('kv-first', 'blocks-first', 'mla'),
  numBlocks: fc.integer({ min: 1, max: 40 }),
  blockSize: fc.integer({ min: 1, max: 17 }),
  heads: fc.integer({ min: 1, max: 4 }),
  headDim: fc.constantFrom(1, 3, 8, 64, 128),
  dtype: fc.constantFrom(...(Object.keys(DTYPE_BYTES) as Dtype[])),
});

describe('gather and scatter', () => {
  test('equal the host version on random shapes, dtypes, block tables and alignments', async () => {
    const host = new HostDevice();
    const hostStream = host.createStream();
    const cases = layouts.chain((layout) =>
      fc.record({
        layout: fc.constant(layout),
        ids: fc.array(fc.nat(layout.numBlocks - 1), { minLength: 1, maxLength: 24 }),
        skip: fc.nat(3),
        offset: fc.constantFrom(0, 16, 1),
        seed: fc.nat(250),
      }),
    );
    await fc.assert(
      fc.asyncProperty(cases, async ({ layout, ids, skip: wantedSkip, offset, seed }) => {
        const blockIds = Int32Array.from(new Set(ids));
        const skip = Math.min(wantedSkip, blockIds.length);
        const content = Uint8Array.from(
          { length: layerBytes(layout) },
          (_, i) => (i * 31 + (i >> 8) + seed) & 255,
        );
        const hostLayer = { memory: hostMemory(content.length), layout };
        hostView(hostLayer.memory).set(content);
        const layer = { memory: upload(content, offset), layout };

        const expected = hostMemory(blockBytes(layout) * blockIds.length);
        host.gather(expected, hostLayer, blockIds, hostStream);
        const gathered = upload(new Uint8Array(expected.bytes).fill(0xee), offset);
        device.gather(gathered, layer, blockIds, stream);
        expect(Buffer.compare(download(gathered), hostView(expected))).toBe(0);

        const changed = hostMemory(expected.bytes);
        hostView(changed).set(hostView(expected).map((byte) => byte ^ 0x5a));
        host.scatter(hostLayer, blockIds, changed, hostStream, skip);
        device.scatter(layer, blockIds, upload(hostView(changed), offset), stream, skip);
        expect(Buffer.compare(download(layer.memory), hostView(hostLayer.memory))).toBe(0);
        await drained();
      }),
      { numRuns: 60 },
    );
  });

  test('a list longer than one launch takes, and overflow memory as the tensor', async () => {
    const layout: PagedLayout = {
      family: 'kv-first',
      numBlocks: 2_500,
      blockSize: 2,
      heads: 1,
      headDim: 8,
      dtype: 'bfloat16',
    };
    const content = Uint8Array.from({ length: layerBytes(layout) }, (_, i) => (i ^ (i >> 7)) & 255);
    const layer = { memory: upload(content), layout };
    const blockIds = Int32Array.from({ length: 2_000 }, (_, i) => (i * 7) % 2_500);
    const pinned = await device.allocatePinned(blockBytes(layout) * blockIds.length, 'overflow');
    device.gather(pinned, layer, blockIds, stream);
    await drained();
    const expected = hostMemory(pinned.bytes);
    const host = new HostDevice();
    const hostLayer = { memory: hostMemory(content.length), layout };
    hostView(hostLayer.memory).set(content);
    host.gather(expected, hostLayer, blockIds, host.createStream());
    expect(Buffer.compare(device.view(pinned), hostView(expected))).toBe(0);
  });

  test.each([
    ['of a short request', 70, 3, 0],
    ['of a long one', 3, 1_500, 1],
    ['skipping all', 2, 4, 4],
  ])('many layers %s, of two layouts and alignments, in one call', async (_, layers, blocks, skip) => {
    const host = new HostDevice();
    const hostStream = host.createStream();
    const layoutOf = (i: number): PagedLayout => ({
      family: i < layers - 1 ? 'kv-first' : 'blocks-first',
      numBlocks: blocks + 5,
      blockSize: 2,
      heads: 1,
      headDim: 8,
      dtype: 'uint8',
    });
    const blockIds = Int32Array.from({ length: blocks }, (_, i) => (i * 7 + 2) % (blocks + 5));
    const sets = Array.from({ length: layers }, (_, i) => {
      const layout = layoutOf(i);
      const content = Uint8Array.from({ length: layerBytes(layout) }, (_, at) => (at * 3 + i) & 255);
      const hostLayer = { memory: hostMemory(content.length), layout };
      hostView(hostLayer.memory).set(content);
      const bytes = blockBytes(layout) * blocks;
      // One of them cannot be copied 16 bytes at a time.
      const layer = { memory: upload(content, i === 1 ? 1 : 0), layout };
      return { layer, hostLayer, tensor: upload(new Uint8Array(bytes)), hostTensor: hostMemory(bytes) };
    });
    device.gatherLayers(sets, blockIds, stream);
    host.gatherLayers(
      sets.map(({ hostLayer, hostTensor }) => ({ layer: hostLayer, tensor: hostTensor })),
      blockIds,
      hostStream,
    );
    for (const { tensor, hostTensor } of sets) {
      expect(Buffer.compare(download(tensor), hostView(hostTensor))).toBe(0);
    }
    const reversed = blockIds.slice().reverse();
    device.scatterLayers(sets, reversed, stream, skip);
    host.scatterLayers(
      sets.map(({ hostLayer, hostTensor }) => ({ layer: hostLayer, tensor: hostTensor })),
      reversed,
      hostStream,
      skip,
    );
    for (const { layer, hostLayer } of sets) {
      expect(Buffer.compare(download(layer.memory), hostView(hostLayer.memory))).toBe(0);
    }
    await drained();
  });

  test('refuse ids and sizes that would write elsewhere in the GPU', () => {
    const layout: PagedLayout = {
      family: 'mla',
      numBlocks: 4,
      blockSize: 1,
      heads: 1,
      headDim: 16,
      dtype: 'int8',
    };
    const layer = { memory: device.allocate(layerBytes(layout), 'test'), layout };
    const tensor = device.allocate(32, 'test');
    expect(() => device.gather(tensor, layer, Int32Array.of(0, 4), stream)).toThrow(/block 4/);
    expect(() => device.gather(tensor, layer, Int32Array.of(0, -1), stream)).toThrow(/block -1/);
    expect(() => device.scatter(layer, Int32Array.of(0), tensor, stream)).toThrow(/take 16 bytes/);
  });
});

test('an event of one stream holds another one up, across devices', async () => {
  const other = device.createStream();
  const first = upload(new Uint8Array(64).fill(1));
  const second = upload(new Uint8Array(64).fill(2));
  device.copy(first, second, stream);
  const event = stream.record();
  other.wait(event.ref);
  const result = upload(new Uint8Array(64));
  device.copy(result, first, other);
  const done = other.record();
  await poller.wait(done, 60_000, 'test');
  expect(download(result)[0]).toBe(2);
  for (const held of [event, done, other]) held.dispose();
});

test('out of memory says what for, how much was wanted and how much is free', () => {
  expect(() => device.allocate(2 ** 40, 'KV buffer')).toThrow(
    expect.objectContaining({
      code: 'OUT_OF_DEVICE_MEMORY',
      message: expect.stringMatching(
        /KV buffer: 1099511627776 bytes are wanted on cuda:1, which has \d+ of \d+ free/,
      ),
    }),
  );
});

test('page-locked memory that cannot be had is an error of its own, from the other thread', async () => {
  standIns.faults('cudaHostAlloc=2');
  await expect(device.allocatePinned(4096, 'host pool')).rejects.toMatchObject({
    code: 'OUT_OF_DEVICE_MEMORY',
    message: expect.stringContaining('host pool'),
  });
});

test('work that fails on the GPU is noticed when its event is polled', async () => {
  standIns.faults('cudaEventQuery=700');
  const event = stream.record();
  expect(() => event.done()).toThrow(
    expect.objectContaining({
      code: 'CUDA_ERROR',
      message: expect.stringContaining('cudaErrorIllegalAddress'),
    }),
  );
  event.dispose();
});

test.each([
  ['a GPU that is not there', 7, '', 'DEVICE_UNAVAILABLE', /cuda:7 is not there: this process sees 2 GPUs/],
  ['no GPU', 0, 'cudaGetDeviceCount=100', 'DEVICE_UNAVAILABLE', /no CUDA-capable device/],
  ['a GPU that refuses', 0, 'cudaSetDevice=101', 'DEVICE_UNAVAILABLE', /invalid device ordinal/],
])('%s', async (_name, index, faults, code, message) => {
  standIns.faults(faults);
  await expect(createCudaDevice(index)).rejects.toMatchObject({
    code,
    message: expect.stringMatching(message),
  });
});

test('where no shipped image loads, the kernels are compiled once and kept', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'pd-kernels-'));
  process.env['PD_KERNEL_CACHE'] = folder;
  try {
    standIns.faults('cubin=209,ptx=222');
    const first = await createCudaDevice(0);
    expect(first.kernelImage).toBe('gather_scatter.cu by NVRTC');
    expect(readdirSync(folder)).toHaveLength(1);
    first.dispose();
    standIns.faults('cubin=209,ptx=222,nvrtcCompileProgram=6');
    const second = await createCudaDevice(0);
    second.dispose();
    rmSync(join(folder, readdirSync(folder)[0]!));
    await expect(createCudaDevice(0)).rejects.toMatchObject({
      code: 'CUDA_ERROR',
      message: expect.stringMatching(
        /gather_scatter.cu failed with 6[\s\S]*--gpu-architecture=sm_90[\s\S]*\n +1 {2}\/\/ Gather/,
      ),
    });
  } finally {
    delete process.env['PD_KERNEL_CACHE'];
    rmSync(folder, { recursive: true });
  }
});
