/** Every call of the libraries fails once: there is an error that names it, nothing hangs, and the ends are clean. */
import { beforeAll, describe, expect, test } from 'vitest';
import type { CudaDevice } from '../../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import { hostMemory } from '../../../src/device/memory.ts';
import { EventPoller } from '../../../src/device/poller.ts';
import { PdError } from '../../../src/errors.ts';
import { layerBytes, type PagedLayout } from '../../../src/kv/layout.ts';
import { createNcclTransport, type NcclTransport } from '../../../src/transport/nccl/transport.ts';
import { type StandIns, useStandIns } from '../../stand-ins/build.ts';

let standIns: StandIns;
beforeAll(() => {
  standIns = useStandIns();
});

const LAYOUT: PagedLayout = {
  family: 'kv-first',
  numBlocks: 4,
  blockSize: 2,
  heads: 1,
  headDim: 8,
  dtype: 'float32',
};

/** All that a worker does with a GPU, end to end; every wait has a deadline. */
async function work(devices: CudaDevice[], transports: NcclTransport[]): Promise<void> {
  for (const index of [0, 1]) devices.push(await createCudaDevice(index));
  const [here, there] = devices as [CudaDevice, CudaDevice];
  for (const device of [here, there]) {
    transports.push(
      await createNcclTransport(device, {
        bindHost: '127.0.0.1',
        announceHost: '127.0.0.1',
        ncclNumChannels: 8,
      }),
    );
  }
  const [left, right] = transports as [NcclTransport, NcclTransport];
  const layer = { memory: here.allocate(layerBytes(LAYOUT), 'cache'), layout: LAYOUT };
  const stream = here.createStream();
  const tensor = here.allocate(256, 'tensor');
  const pinned = await there.allocatePinned(256, 'pool');
  here.copy(layer.memory, hostMemory(layerBytes(LAYOUT)), stream);
  here.gather(tensor, layer, Int32Array.of(2, 0), stream);
  const gathered = stream.record();
  stream.wait(gathered.ref);
  await new EventPoller().wait(gathered, 60_000, 'gather');
  gathered.dispose();
  const uniqueId = left.createUniqueId();
  const pairs = await Promise.all([
    left.open({ uniqueId, rank: 0, peer: 'right', timeoutMs: 60_000 }),
    right.open({ uniqueId, rank: 1, peer: 'left', timeoutMs: 60_000 }),
  ]);
  const options = { tensorId: 'tensor', timeoutMs: 60_000 };
  await Promise.all([pairs[0].send([tensor], options), pairs[1].receive([pinned], options)]);
}

const CALLS = [
  ...['cuInit', 'cuDriverGetVersion', 'cuModuleLoadData', 'cuModuleGetFunction', 'cuLaunchKernel'],
  ...[
    'cudaGetDeviceCount',
    'cudaSetDevice',
    'cudaDeviceGetAttribute',
    'cudaMalloc',
    'cudaHostAlloc',
    'cudaMemcpyAsync',
  ],
  ...[
    'cudaStreamCreateWithFlags',
    'cudaStreamWaitEvent',
    'cudaEventCreateWithFlags',
    'cudaEventRecord',
    'cudaEventQuery',
  ],
  ...['ncclGetUniqueId', 'ncclCommInitRankConfig', 'ncclCommGetAsyncError'],
  ...['ncclGroupStart', 'ncclGroupEnd', 'ncclSend', 'ncclRecv'],
];

describe('a call that fails', () => {
  test.each(CALLS)('%s', async (call) => {
    const devices: CudaDevice[] = [];
    const transports: NcclTransport[] = [];
    standIns.faults(`${call}=3`);
    const error = await work(devices, transports).catch((thrown: unknown) => thrown);
    standIns.faults('');
    // the driver keeps the version it has told once; everything else is asked again
    if (call !== 'cuInit' && call !== 'cuDriverGetVersion') {
      expect(error).toBeInstanceOf(PdError);
      expect((error as PdError).message).toContain(`${call} failed with 3`);
    }
    await Promise.all(transports.map((transport) => transport.dispose()));
    for (const device of devices) device.dispose();
  });
});

test.each([
  'cudaFree',
  'cudaFreeHost',
  'cudaStreamDestroy',
  'cudaStreamQuery',
  'cudaEventDestroy',
  'ncclCommAbort',
  'ncclCommFinalize',
])('an end in which %s fails goes on', async (call) => {
  const devices: CudaDevice[] = [];
  const transports: NcclTransport[] = [];
  await work(devices, transports);
  standIns.faults(`${call}=3`);
  await Promise.all(transports.map((transport) => transport.dispose()));
  for (const device of devices) device.dispose();
  standIns.faults('');
});
