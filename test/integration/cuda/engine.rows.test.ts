/** Transfer engines on GPUs of stand-ins: paged blocks from cuda:0 to paged blocks on cuda:1, gathered and scattered by kernels. */
import { randomFillSync } from 'node:crypto';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import type { CudaDevice } from '../../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import type { PagedLayer } from '../../../src/device/device.ts';
import { hostMemory, hostView } from '../../../src/device/memory.ts';
import { wireShape } from '../../../src/kv/families.ts';
import { layerBytes } from '../../../src/kv/layout.ts';
import { TransferEngine } from '../../../src/transfer/engine.ts';
import { type TransferId, tensorIdOf } from '../../../src/wire/ids.ts';
import type { SendType } from '../../../src/wire/messages.ts';
import { type StandIns, useStandIns } from '../../stand-ins/build.ts';
import { rows, withTheOthers } from '../../support/rows.ts';
import { blockOf, failure, LAYOUT, loadRequest, Services, transferOptions } from '../../support/transfer.ts';

const engines = new Services();
let standIns: StandIns;
let devices: readonly [CudaDevice, CudaDevice];

beforeAll(async () => {
  standIns = useStandIns();
  devices = [await createCudaDevice(0), await createCudaDevice(1)];
});
afterEach(async () => {
  standIns.faults('');
  await engines.dispose();
});
afterAll(() => {
  for (const device of devices) device.dispose();
});

const make = async (...args: Parameters<typeof transferOptions>) =>
  engines.add(await TransferEngine.create(transferOptions(...args)));

interface Layer {
  readonly name: string;
  readonly target: PagedLayer;
}

/** Layers of random contents in GPU memory, and a way to read one back as host memory. */
function cache(device: CudaDevice, layers: number): Layer[] {
  const stream = device.createStream();
  const made = Array.from({ length: layers }, (_, index) => {
    const memory = device.allocate(layerBytes(LAYOUT), 'cache');
    const contents = hostMemory(memory.bytes);
    randomFillSync(hostView(contents));
    device.copy(memory, contents, stream);
    return { name: `model.layers.${index}.self_attn.attn`, target: { memory, layout: LAYOUT } };
  });
  stream.dispose();
  return made;
}

function read(device: CudaDevice, layer: Layer, block: number): Buffer {
  const stream = device.createStream();
  const memory = hostMemory(layer.target.memory.bytes);
  device.copy(memory, layer.target.memory, stream);
  stream.dispose();
  return blockOf({ memory, layout: LAYOUT }, block);
}

describe.each(rows<SendType>(['PUT_ASYNC', 'GET'], ['PUT']))('%s', (sendType) => {
  test('moves the blocks of a request, past the device buffer into page-locked memory', async () => {
    // 8 layers of 5 blocks are 81,920 bytes: the buffer holds two tensors, the pool takes the rest
    const kvBufferSize = 24_000;
    const producer = await make({ device: 'cuda:0', sendType, kvBufferSize });
    const consumer = await make({ device: 'cuda:1', sendType, kvBufferSize });
    const from = cache(devices[0], 8);
    const to = cache(devices[1], 8);
    const source = [3, 0, 9, 15, 7];
    const target = [1, 2, 14, 8, 0];
    const untouched = read(devices[1], to[0]!, 3);
    const stream = devices[0].createStream();
    const ready = stream.record();
    const handles = from.map(({ name, target: layer }) =>
      producer.send({
        tensorId: tensorIdOf('cmpl-a-0' as TransferId, name),
        shape: wireShape(LAYOUT, source.length),
        dtype: LAYOUT.dtype,
        source: { kind: 'blocks', layer, blockIds: Int32Array.from(source) },
        ready: ready.ref,
        ...(sendType === 'GET' ? {} : { peer: consumer.address }),
      }),
    );
    const loaded = await consumer.load(
      loadRequest('cmpl-a-0-0123abcd', to, target, producer.address, { skipBlocks: 1 }),
    );
    await Promise.all(handles.map(({ sent }) => sent));
    expect(loaded.bytes).toBe(8 * 5 * 2 * 256);
    for (const [index, layer] of to.entries()) {
      for (const [at, block] of source.entries()) {
        const same = read(devices[1], layer, target[at]!).equals(read(devices[0], from[index]!, block));
        expect(same).toBe(at > 0);
      }
    }
    expect(read(devices[1], to[0]!, 3).equals(untouched)).toBe(true);
    consumer.finish('cmpl-a-0' as TransferId);
    producer.finish('cmpl-a-0' as TransferId);
    for (const engine of [producer, consumer]) {
      const { buffer, pool } = await engine.state();
      expect([buffer.usedBytes, pool.usedBytes]).toEqual([0, 0]);
    }
    ready.dispose();
  });
});

test.skipIf(withTheOthers)(
  'a pair whose init never ends fails the send at its deadline; the next one is served',
  async () => {
    // Waited out once; and within it the next pair is to open, on a busy machine too.
    const timeouts = { pairInit: 2_000 };
    const producer = await make({ device: 'cuda:0', timeouts });
    const consumer = await make({ device: 'cuda:1', timeouts });
    const memory = devices[0].allocate(4_096, 'test');
    const send = (id: string) =>
      producer.send({
        tensorId: tensorIdOf(id as TransferId, 'l'),
        shape: [4_096],
        dtype: 'uint8',
        source: { kind: 'flat', memory },
        peer: consumer.address,
      });
    standIns.faults('init=hang');
    expect((await failure(send('first').sent)).code).toBe('PAIR_INIT_TIMEOUT');
    standIns.faults('');
    // the failure of a peer is remembered for about a second
    await expect
      .poll(() => send('next').sent.catch((error) => error.code), { timeout: 60_000, interval: 100 })
      .toBe(4_096);
  },
);

test.skipIf(withTheOthers).each([
  ['cuda:5', '', 'DEVICE_UNAVAILABLE'],
  ['cuda:0', 'cudaMalloc=2', 'OUT_OF_DEVICE_MEMORY'],
  ['cuda:0', 'cuInit=100', 'DEVICE_UNAVAILABLE'],
  ['cuda:0', 'ncclGetVersion=1', 'NCCL_ERROR'],
])('an engine on %s with %j does not start, for a reason with a code', async (device, faults, code) => {
  standIns.faults(faults);
  expect((await failure(TransferEngine.create(transferOptions({ device })))).code).toBe(code);
});
