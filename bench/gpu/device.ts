/**
 * What only a real GPU can show about kernels and NCCL, on one GPU: gather and scatter from every kernel image against the host's, their
 * speed, and a pair whose other end never joins. `node dist/bench/gpu/device.js [--small]`
 */
import { formatNcclVersion } from '../../ffi/libnccl.ts';
import { libraryFile } from '../../ffi/load.ts';
import type { CudaDevice } from '../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../src/device/cuda.ts';
import type { MemoryRef, Stream } from '../../src/device/device.ts';
import { HostDevice } from '../../src/device/host.ts';
import { hostMemory, hostView, sliceMemory } from '../../src/device/memory.ts';
import { EventPoller } from '../../src/device/poller.ts';
import { PdError } from '../../src/errors.ts';
import { blockBytes, type LayoutFamily, layerBytes, type PagedLayout } from '../../src/kv/layout.ts';
import { createNcclTransport } from '../../src/transport/nccl/transport.ts';
import { DTYPE_BYTES, type Dtype } from '../../src/wire/dtype.ts';
import { conclude, part, row } from './rows.ts';

const MIB = 2 ** 20;
/** Room for a layer's cache, and for a tensor. */
const AREA = 64 * MIB;
const IMAGES = ['cubin', 'ptx', 'nvrtc'] as const;
const FAMILIES: readonly LayoutFamily[] = ['kv-first', 'blocks-first', 'mla'];
const SETTLE_MS = 60_000;
const NOBODY_MS = 500;
/** Limit on aborting a communicator that nobody joined. */
const ABORT_MS = 15_000;

const small = process.argv.includes('--small');
const poller = new EventPoller();
const ms = (value: number) => `${value.toFixed(value < 10 ? 3 : 1)} ms`;
const random = (below: number) => Math.floor(Math.random() * below);
const pick = <T>(values: readonly T[]): T => values[random(values.length)]!;

/** Resolves when everything on `stream` has been done. */
async function settled(stream: Stream): Promise<void> {
  const event = stream.record();
  await poller.wait(event, SETTLE_MS, 'device check');
  event.dispose();
}

/** Resolves when the copy is done. */
async function upload(device: CudaDevice, stream: Stream, target: MemoryRef, from: MemoryRef): Promise<void> {
  device.copy(target, from, stream);
  await settled(stream);
}
async function download(device: CudaDevice, stream: Stream, from: MemoryRef): Promise<Uint8Array> {
  const host = hostMemory(from.bytes);
  device.copy(host, from, stream);
  await settled(stream);
  return hostView(host);
}

function randomMemory(bytes: number): MemoryRef {
  const memory = hostMemory(bytes);
  const view = hostView(memory);
  for (let at = 0; at < bytes; at += 65_536) crypto.getRandomValues(view.subarray(at, at + 65_536));
  return memory;
}

/** Any family, type and shape of which a layer fits into the area. */
function randomLayout(): PagedLayout {
  const layout: PagedLayout = {
    family: pick(FAMILIES),
    numBlocks: 1 + random(small ? 50 : pick([200, 200, 200, 3_000])),
    blockSize: 1 + random(16),
    heads: 1 + random(4),
    headDim: pick([1, 3, 8, 64, 128]),
    dtype: pick(Object.keys(DTYPE_BYTES) as Dtype[]),
  };
  return layerBytes(layout) > AREA - 16 ? randomLayout() : layout;
}

/** Gathers and scatters random blocks of random layouts, at addresses of different alignment, on the GPU and on the host. */
async function equalToHost(device: CudaDevice, cases: number): Promise<void> {
  const host = new HostDevice();
  const [stream, onHost] = [device.createStream(), host.createStream()];
  const [area, flat] = [device.allocate(AREA, 'layer'), device.allocate(AREA, 'tensor')];
  let equal = 0;
  for (let i = 0; i < cases; i++) {
    const layout = randomLayout();
    const ids = Int32Array.from({ length: layout.numBlocks }, (_, id) => id)
      .sort(() => Math.random() - 0.5)
      .subarray(0, 1 + random(layout.numBlocks));
    const skip = random(Math.min(4, ids.length));
    const offset = pick([0, 16, 1]);
    const content = randomMemory(layerBytes(layout));
    const layer = { memory: sliceMemory(area, offset, content.bytes), layout };
    const hostLayer = { memory: content, layout };
    const tensor = sliceMemory(flat, offset, blockBytes(layout) * ids.length);
    await upload(device, stream, layer.memory, content);
    const gathered = hostMemory(tensor.bytes);
    host.gather(gathered, hostLayer, ids, onHost);
    device.gather(tensor, layer, ids, stream);
    const gathers = Buffer.compare(await download(device, stream, tensor), hostView(gathered)) === 0;
    const changed = randomMemory(tensor.bytes);
    await upload(device, stream, tensor, changed);
    host.scatter(hostLayer, ids, changed, onHost, skip);
    device.scatter(layer, ids, tensor, stream, skip);
    const scatters = Buffer.compare(await download(device, stream, layer.memory), hostView(content)) === 0;
    if (gathers && scatters) equal++;
    else
      row(`case ${i}`, JSON.stringify({ layout, ids: ids.length, skip, offset, gathers, scatters }), false);
  }
  row(
    `gather and scatter equal the host's (${device.kernelImage})`,
    `${equal} of ${cases} random cases`,
    equal === cases,
  );
}

/** Times of gather and scatter, with the layout of one layer of Llama-3-8B. */
async function copyTimes(device: CudaDevice): Promise<void> {
  const numBlocks = small ? 64 : 16_384;
  const shape = { blockSize: 16, heads: 8, headDim: 128 };
  const layout: PagedLayout = { family: 'kv-first', numBlocks, dtype: 'bfloat16', ...shape };
  const layer = { memory: device.allocate(layerBytes(layout), 'cache'), layout };
  const stream = device.createStream();
  const repeats = small ? 3 : 50;
  for (const blocks of small ? [32] : [32, 512, 2_048, 8_192]) {
    const tensor = device.allocate(blockBytes(layout) * blocks, 'tensor');
    const ids = Int32Array.from({ length: blocks }, (_, i) => (i * 7_919) % numBlocks);
    const acts = {
      gather: () => device.gather(tensor, layer, ids, stream),
      scatter: () => device.scatter(layer, ids, tensor, stream),
    };
    const times: string[] = [];
    for (const [name, act] of Object.entries(acts)) {
      for (let i = 0; i < 5; i++) act();
      await settled(stream);
      const start = performance.now();
      for (let i = 0; i < repeats; i++) act();
      await settled(stream);
      const each = (performance.now() - start) / repeats;
      times.push(`${name} ${ms(each)} ${((2 * tensor.bytes) / each / 1e9).toFixed(2)} TB/s`);
    }
    row(`paged copy of ${tensor.bytes / MIB} MiB, read and written`, times.join('   '));
  }
}

/** NCCL waits forever for a rank that does not join; a pair must not. */
async function nobodyComes(device: CudaDevice): Promise<void> {
  const transport = await createNcclTransport(device, {
    bindHost: '127.0.0.1',
    announceHost: '127.0.0.1',
    ncclNumChannels: 16,
  });
  const { version, library } = transport.nccl;
  row('NCCL', `${formatNcclVersion(version)} ${libraryFile(library)}`);
  const uniqueId = transport.createUniqueId();
  const start = performance.now();
  const error = await transport.open({ uniqueId, rank: 0, peer: 'nobody', timeoutMs: NOBODY_MS }).then(
    () => undefined,
    (reason: unknown) => PdError.from(reason),
  );
  const failedAfter = performance.now() - start;
  await transport.dispose();
  const overAfter = performance.now() - start;
  row(
    `open without a peer, deadline ${NOBODY_MS} ms`,
    `${error?.code} after ${ms(failedAfter)}, communicator aborted after ${ms(overAfter)}`,
    error?.code === 'PAIR_INIT_TIMEOUT' && overAfter < ABORT_MS,
  );
}

for (const image of IMAGES) {
  process.env['PD_KERNELS'] = image;
  await part(image, async () => {
    const device = await createCudaDevice(0);
    await equalToHost(device, small ? 10 : 150);
    device.dispose();
  });
}
delete process.env['PD_KERNELS'];
await part('device', async () => {
  const device = await createCudaDevice(0);
  const { driver, runtime, target, multiProcessors } = device;
  row(
    'GPU',
    `${driver.deviceName(0)}, sm_${target.major}${target.minor}, ${multiProcessors} multiprocessors`,
  );
  const [driverFile, runtimeFile] = [libraryFile(driver.library), libraryFile(runtime.library)];
  row('CUDA', `${driver.driverVersion()} ${driverFile}, ${runtime.version()} ${runtimeFile}`);
  await copyTimes(device);
  await nobodyComes(device);
  device.dispose();
});
poller.dispose();
conclude();
