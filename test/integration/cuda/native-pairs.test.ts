/** The native hand-over on pairs between GPUs of stand-ins: bytes leave and come by memory of `--kv-buffer-size`. */
import { afterEach, beforeAll, expect, test } from 'vitest';
import type { CudaDevice } from '../../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import { layerBytes } from '../../../src/kv/layout.ts';
import { useStandIns } from '../../stand-ins/build.ts';
import { compute, finish, idFor, LAYERS, makeEnd, outcomeOf, wantOf } from '../../support/native.ts';
import { LAYOUT, leftovers, Services, until } from '../../support/transfer.ts';
import { WatchedTransport } from '../../support/watched-transport.ts';

const TOKENS = 14;

const services = new Services();
let devices: readonly CudaDevice[];

beforeAll(async () => {
  useStandIns();
  devices = [await createCudaDevice(0), await createCudaDevice(1)];
  return () => {
    for (const device of devices) device.dispose();
  };
});
afterEach(() => services.dispose());

function makeOn(gpu: 0 | 1, role: 'producer' | 'consumer', watched: WatchedTransport) {
  const cache = Array.from({ length: LAYERS }, () => ({
    memory: devices[gpu]!.allocate(layerBytes(LAYOUT), 'cache'),
    layout: LAYOUT,
  }));
  const { wrap: wrapTransport } = watched;
  return makeEnd(services, role, { device: `cuda:${gpu}`, transports: ['nccl'], cache, wrapTransport });
}

test('a pair that ends in the middle of its KV leaves no memory of the buffer taken, at either end', async () => {
  const watched = new WatchedTransport();
  const producer = await makeOn(0, 'producer', watched);
  const consumer = await makeOn(1, 'consumer', watched);
  const handOver = async () => {
    const id = idFor(producer, consumer);
    consumer.handOver.want(wantOf(producer, consumer, id, TOKENS));
    producer.blocks.allocate(id, TOKENS);
    producer.handOver.begin({ transferId: id, promptDigest: 'prompt', tokens: TOKENS });
    await compute(producer, id, TOKENS);
    finish(producer, id);
    return id;
  };
  watched.hold();
  const id = await handOver();
  const ends = [producer, consumer];
  await until('KV on its way', () => ends.every(({ service }) => service.state().buffer.usedBytes > 0));
  watched.kill();
  expect(await outcomeOf(consumer)).toMatchObject({ ok: false, error: { code: 'KV_LOAD_FAILED' } });
  consumer.blocks.free(id);
  await until('memory given back', () => ends.every(({ service }) => leftovers(service).length === 0));

  watched.release();
  const next = await handOver();
  expect(await outcomeOf(consumer)).toMatchObject({ ok: true });
  consumer.blocks.free(next);
  for (const end of ends) await until('books at zero', () => end.leftovers().length === 0);
});
