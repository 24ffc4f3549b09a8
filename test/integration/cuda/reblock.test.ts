/** The CUDA device runs copy plans by the paged copy kernels: equal to the host's, over the stand-in libraries. */
import fc from 'fast-check';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { CudaDevice } from '../../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import { HostDevice } from '../../../src/device/host.ts';
import { hostMemory, hostView } from '../../../src/device/memory.ts';
import { EventPoller } from '../../../src/device/poller.ts';
import type { WireForm } from '../../../src/kv/families.ts';
import { layerBytes, type PagedLayout } from '../../../src/kv/layout.ts';
import { planCopy } from '../../../src/kv/reblock.ts';
import { wireTensor } from '../../../support/wire-kv.ts';
import { useStandIns } from '../../stand-ins/build.ts';

let device: CudaDevice;

beforeAll(async () => {
  useStandIns();
  device = await createCudaDevice(1);
});
afterAll(() => device.dispose());

const cases = fc
  .record({
    cacheFamily: fc.constantFrom('kv-first' as const, 'blocks-first' as const),
    family: fc.constantFrom('tokens' as const, 'kv-first' as const, 'blocks-first' as const),
    ours: fc.constantFrom(4, 16, 24),
    theirs: fc.constantFrom(1, 6, 16, 32),
    headDim: fc.constantFrom(3, 8, 64),
    tokens: fc.integer({ min: 1, max: 90 }),
  })
  .map(({ cacheFamily, family, ours, theirs, headDim, tokens }) => {
    const numBlocks = Math.ceil(tokens / ours) + 3;
    const layout: PagedLayout = {
      family: cacheFamily,
      numBlocks,
      blockSize: ours,
      heads: 2,
      headDim,
      dtype: 'bfloat16',
    };
    const form: WireForm =
      family === 'tokens'
        ? { family, blocks: tokens, blockSize: 1 }
        : { family, blocks: Math.ceil(tokens / theirs), blockSize: theirs };
    const blockIds = Int32Array.from({ length: numBlocks - 3 }, (_, i) => numBlocks - 1 - i);
    return { layout, form, blockIds, tokens };
  });

test('property: scatter and gather of every family equal those of the host', async () => {
  const host = new HostDevice();
  const hostStream = host.createStream();
  const stream = device.createStream();
  const poller = new EventPoller();
  await fc.assert(
    fc.asyncProperty(cases, async ({ layout, form, blockIds, tokens }) => {
      const plan = planCopy(layout, blockIds, form, { tokens });
      const arrived = wireTensor(form, tokens, layout, 9);
      const tensor = hostMemory(arrived.length);
      hostView(tensor).set(arrived);
      const cache = hostMemory(layerBytes(layout));
      host.reblock('scatter', cache, tensor, plan, hostStream);

      const deviceTensor = device.allocate(arrived.length, 'test');
      const deviceCache = device.allocate(layerBytes(layout), 'test');
      device.copy(deviceTensor, tensor, stream);
      device.copy(deviceCache, hostMemory(deviceCache.bytes), stream);
      device.reblock('scatter', deviceCache, deviceTensor, plan, stream);
      const scattered = hostMemory(deviceCache.bytes);
      device.copy(scattered, deviceCache, stream);
      device.copy(deviceTensor, hostMemory(arrived.length), stream);
      device.reblock('gather', deviceCache, deviceTensor, plan, stream);
      const gathered = hostMemory(arrived.length);
      device.copy(gathered, deviceTensor, stream);
      const event = stream.record();
      await poller.wait(event, 60_000, 'test');
      event.dispose();
      expect(hostView(scattered)).toEqual(hostView(cache));
      expect(hostView(gathered)).toEqual(wireTensor(form, tokens, layout, 9, 0));
    }),
    { numRuns: 25 },
  );
  stream.dispose();
});
