/**
 * What only real GPUs can show, as one table: libraries, kernels against the host version, two processes over NCCL, faults, raw speed.
 * Needs two GPUs. `node dist/bench/gpu/check.js [kernels|pair|faults|speed ...]`
 */
import { createHash } from 'node:crypto';
import { formatNcclVersion } from '../../ffi/libnccl.ts';
import { libraryFile } from '../../ffi/load.ts';
import type { CudaDevice } from '../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../src/device/cuda.ts';
import type { MemoryRef } from '../../src/device/device.ts';
import { HostDevice } from '../../src/device/host.ts';
import { hostMemory, hostView, sliceMemory } from '../../src/device/memory.ts';
import { EventPoller } from '../../src/device/poller.ts';
import { PdError } from '../../src/errors.ts';
import { blockBytes, type LayoutFamily, layerBytes, type PagedLayout } from '../../src/kv/layout.ts';
import { createNcclTransport, type NcclTransport } from '../../src/transport/nccl/transport.ts';
import type { Pair } from '../../src/transport/transport.ts';
import { DTYPE_BYTES, type Dtype } from '../../src/wire/dtype.ts';
import { Peer } from './rig.ts';

const MIB = 2 ** 20;
const ARENA = Number(process.env['PD_CHECK_ARENA_MIB'] ?? 3_072) * MIB;
const wanted = new Set(process.argv.slice(2));
const wants = (name: string) => wanted.size === 0 || wanted.has(name);
const poller = new EventPoller();
let failures = 0;

function row(name: string, value: string, ok = true): void {
  if (!ok) failures++;
  console.log(`${ok ? '  ' : 'X '}${name.padEnd(52)} ${value}`);
}
const ms = (value: number) => `${value.toFixed(value < 10 ? 3 : 1)} ms`;
const random = (below: number) => Math.floor(Math.random() * below);

async function drained(device: CudaDevice, stream = device.createStream()): Promise<void> {
  const event = stream.record();
  await poller.wait(event, 60_000, 'check');
  event.dispose();
}

function upload(device: CudaDevice, memory: MemoryRef, bytes: Uint8Array): void {
  const host = hostMemory(bytes.length);
  hostView(host).set(bytes);
  const stream = device.createStream();
  device.copy(memory, host, stream);
  stream.dispose();
}
function download(device: CudaDevice, memory: MemoryRef): Uint8Array {
  const host = hostMemory(memory.bytes);
  const stream = device.createStream();
  device.copy(host, memory, stream);
  stream.dispose();
  return hostView(host);
}
function randomBytes(length: number): Uint8Array {
  const bytes = new Uint8Array(length);
  for (let at = 0; at < length; at += 65_536) crypto.getRandomValues(bytes.subarray(at, at + 65_536));
  return bytes;
}

async function kernels(device: CudaDevice): Promise<void> {
  const host = new HostDevice();
  const stream = device.createStream();
  const area = device.allocate(64 * MIB, 'kernels');
  const flat = device.allocate(64 * MIB, 'kernels');
  let equal = 0;
  const cases = 150;
  for (let i = 0; i < cases; i++) {
    const layout: PagedLayout = {
      family: (['kv-first', 'blocks-first', 'mla'] as LayoutFamily[])[i % 3]!,
      numBlocks: 1 + random(i % 10 === 0 ? 3_000 : 200),
      blockSize: 1 + random(16),
      heads: 1 + random(4),
      headDim: [1, 3, 8, 64, 128][random(5)]!,
      dtype: (Object.keys(DTYPE_BYTES) as Dtype[])[random(9)]!,
    };
    if (layerBytes(layout) > 60 * MIB) continue;
    const blockIds = Int32Array.from({ length: layout.numBlocks }, (_, id) => id)
      .sort(() => Math.random() - 0.5)
      .subarray(0, 1 + random(layout.numBlocks));
    const skip = random(Math.min(4, blockIds.length));
    const offset = [0, 16, 1][random(3)]!;
    const content = randomBytes(layerBytes(layout));
    const hostLayer = { memory: hostMemory(content.length), layout };
    hostView(hostLayer.memory).set(content);
    const layer = { memory: sliceMemory(area, offset, content.length), layout };
    const tensor = sliceMemory(flat, offset, blockBytes(layout) * blockIds.length);
    upload(device, layer.memory, content);
    upload(device, tensor, randomBytes(tensor.bytes));
    const expected = hostMemory(tensor.bytes);
    host.gather(expected, hostLayer, blockIds, host.createStream());
    device.gather(tensor, layer, blockIds, stream);
    await drained(device, stream);
    const gathered = Buffer.compare(download(device, tensor), hostView(expected)) === 0;
    const changed = hostMemory(tensor.bytes);
    hostView(changed).set(randomBytes(tensor.bytes));
    upload(device, tensor, hostView(changed));
    host.scatter(hostLayer, blockIds, changed, host.createStream(), skip);
    device.scatter(layer, blockIds, tensor, stream, skip);
    await drained(device, stream);
    const scattered = Buffer.compare(download(device, layer.memory), hostView(hostLayer.memory)) === 0;
    if (gathered && scattered) equal++;
    else
      row(
        `case ${i}`,
        JSON.stringify({ layout, ids: blockIds.length, skip, offset, gathered, scattered }),
        false,
      );
  }
  row(`gather and scatter equal the host (${device.kernelImage})`, `${equal} random cases`);
}

async function kernelSpeed(device: CudaDevice): Promise<void> {
  const layout: PagedLayout = {
    family: 'kv-first',
    numBlocks: 16_384,
    blockSize: 16,
    heads: 8,
    headDim: 128,
    dtype: 'bfloat16',
  };
  const layer = { memory: device.allocate(layerBytes(layout), 'cache'), layout };
  const stream = device.createStream();
  const copies: [string, number][] = [
    ['2 MiB', 32],
    ['32 MiB', 512],
    ['128 MiB', 2_048],
    ['512 MiB', 8_192],
  ];
  for (const [name, blocks] of copies) {
    const target = device.allocate(blockBytes(layout) * blocks, 'tensor');
    const ids = Int32Array.from({ length: blocks }, (_, i) => (i * 7_919) % layout.numBlocks);
    const repeats = 50;
    const times: string[] = [];
    for (const act of ['gather', 'scatter'] as const) {
      const once = () =>
        act === 'gather'
          ? device.gather(target, layer, ids, stream)
          : device.scatter(layer, ids, target, stream);
      for (let i = 0; i < 5; i++) once();
      await drained(device, stream);
      const start = performance.now();
      for (let i = 0; i < repeats; i++) once();
      await drained(device, stream);
      const each = (performance.now() - start) / repeats;
      times.push(`${act} ${ms(each)} ${((2 * target.bytes) / each / 1e9).toFixed(2)} TB/s`);
    }
    row(`paged copy ${name}, read and written`, times.join('   '));
  }
}

interface Opened {
  readonly pair: Pair;
  readonly milliseconds: number;
}
async function open(transport: NcclTransport, peer: Peer, number: number): Promise<Opened> {
  const start = performance.now();
  const uniqueId = transport.createUniqueId();
  const theirs = peer.ask({ do: 'open', pair: number, uniqueId, timeoutMs: 30_000 });
  const pair = await transport.open({ uniqueId, rank: 0, peer: 'child', timeoutMs: 30_000 });
  const { error } = await theirs;
  if (error) throw new Error(error);
  return { pair, milliseconds: performance.now() - start };
}

async function exchange(
  device: CudaDevice,
  transport: NcclTransport,
  peer: Peer,
  arena: MemoryRef,
): Promise<void> {
  const { pair, milliseconds } = await open(transport, peer, 1);
  row('pair opened', ms(milliseconds));
  for (const regions of [
    [1],
    [4096],
    [MIB + 13],
    [64 * MIB],
    [5, 4096, 3 * MIB + 1, 16 * MIB],
    Array(32).fill(4 * MIB),
  ]) {
    let at = 0;
    const sources = regions.map((bytes: number) => {
      const source = sliceMemory(arena, at, bytes);
      at += Math.ceil(bytes / 256) * 256;
      return source;
    });
    const content = randomBytes(at);
    upload(device, sliceMemory(arena, 0, at), content);
    const receiving = peer.ask({ do: 'receive', pair: 1, regions, count: 1, timeoutMs: 10_000 });
    const start = performance.now();
    await pair.send(sources, { tensorId: 't', timeoutMs: 10_000 });
    const took = performance.now() - start;
    const { error } = await receiving;
    // gaps between regions are not sent: compare the last region, which ends the area
    const { hash } = await peer.ask({ do: 'hash', bytes: regions[0]! });
    const expected = createHash('sha256').update(content.subarray(0, regions[0])).digest('hex');
    row(
      `${regions.length} region(s), ${regions.reduce((a: number, b: number) => a + b, 0)} bytes`,
      `${ms(took)} ${error ?? ''}`,
      hash === expected && !error,
    );
  }
  const count = 1_000;
  const receiving = peer.ask({ do: 'receive', pair: 1, regions: [4096], count, timeoutMs: 30_000 });
  const start = performance.now();
  const small = sliceMemory(arena, 0, 4096);
  await Promise.all(
    Array.from({ length: count }, () => pair.send([small], { tensorId: 's', timeoutMs: 30_000 })),
  );
  row(`${count} sends of 4 KiB, queued together`, `${ms((performance.now() - start) / count)} each`);
  await receiving;
}

async function speed(
  transport: NcclTransport,
  peer: Peer,
  arena: MemoryRef,
  channels: number,
): Promise<void> {
  const { pair } = await open(transport, peer, 10 + channels);
  const sizes: [string, number[], number][] = [
    ['1 MiB', [MIB], 100],
    ['16 MiB', [16 * MIB], 50],
    ['64 MiB', [64 * MIB], 30],
    ['256 MiB', [256 * MIB], 20],
    ['1 GiB', [1024 * MIB], 10],
    ['group of 32 x 4 MiB', Array(32).fill(4 * MIB), 30],
    ['group of 4 x 64 MiB', Array(4).fill(64 * MIB), 20],
  ];
  for (const [name, regions, repeats] of sizes) {
    const bytes = regions.reduce((a, b) => a + b, 0);
    let at = 0;
    const sources = regions.map((length) => {
      at += length;
      return sliceMemory(arena, at - length, length);
    });
    const one = async () => {
      const start = performance.now();
      await pair.send(sources, { tensorId: 'speed', timeoutMs: 20_000 });
      return performance.now() - start;
    };
    const receiving = peer.ask({
      do: 'receive',
      pair: 10 + channels,
      regions,
      count: 2 * repeats + 3,
      timeoutMs: 20_000,
    });
    for (let i = 0; i < 3; i++) await one();
    const single: number[] = [];
    for (let i = 0; i < repeats; i++) single.push(await one());
    single.sort((a, b) => a - b);
    const start = performance.now();
    await Promise.all(Array.from({ length: repeats }, one));
    const each = (performance.now() - start) / repeats;
    const { error } = await receiving;
    const median = single[single.length >> 1]!;
    row(
      `${name}, ${channels} channels`,
      `one ${ms(median)} ${(bytes / median / 1e6).toFixed(0)} GB/s   queued ${ms(each)} ${(bytes / each / 1e6).toFixed(0)} GB/s ${error ?? ''}`,
      !error,
    );
  }
}

async function faults(
  device: CudaDevice,
  transport: NcclTransport,
  first: Peer,
  arena: MemoryRef,
): Promise<void> {
  const since = (start: number) => performance.now() - start;
  const big = sliceMemory(arena, 0, 256 * MIB);

  let start = performance.now();
  const uniqueId = transport.createUniqueId();
  const alone = await transport.open({ uniqueId, rank: 0, peer: 'nobody', timeoutMs: 500 }).then(
    () => undefined,
    (error) => PdError.from(error),
  );
  row(
    'open without a peer, deadline 500 ms',
    `${alone?.code} after ${ms(since(start))}`,
    alone?.code === 'PAIR_INIT_TIMEOUT',
  );

  const { pair } = await open(transport, first, 2);
  start = performance.now();
  const stuck = await pair
    .send([big], { tensorId: 'stuck', timeoutMs: 500 })
    .catch((error) => PdError.from(error));
  const failedAfter = since(start);
  await pair.over;
  row(
    'send that nobody receives, deadline 500 ms',
    `${stuck?.code} after ${ms(failedAfter)}, over after ${ms(since(start))}`,
    stuck?.code === 'TRANSFER_TIMEOUT',
  );

  const victim = new Peer(1, 16);
  await victim.ready;
  const two = [await open(transport, victim, 3), await open(transport, victim, 4)];
  // one transfer each, so that the links stand
  for (const [i, { pair }] of two.entries()) {
    const receiving = victim.ask({ do: 'receive', pair: 3 + i, regions: [MIB], count: 1, timeoutMs: 5_000 });
    await pair.send([sliceMemory(arena, 0, MIB)], { tensorId: 'warm', timeoutMs: 5_000 });
    await receiving;
  }
  void victim.ask({ do: 'receive', pair: 3, regions: [256 * MIB], count: 200, timeoutMs: 20_000 });
  start = performance.now();
  const outcomes = two.map(({ pair }, i) =>
    (i === 0
      ? Promise.all(
          Array.from({ length: 200 }, () => pair.send([big], { tensorId: 'killed', timeoutMs: 1_000 })),
        )
      : pair.receive([sliceMemory(arena, 512 * MIB, MIB)], { tensorId: 'killed', timeoutMs: 1_000 })
    ).then(
      () => undefined,
      (error) => PdError.from(error),
    ),
  );
  await new Promise((resolve) => setTimeout(resolve, 30));
  await victim.kill();
  const codes = (await Promise.all(outcomes)).map((error) => error?.code);
  const failed = since(start);
  await Promise.all(two.map(({ pair }) => pair.over));
  row(
    'kill -9 in mid-transfer, two pairs, deadline 1 s',
    `${codes.join(', ')} after ${ms(failed)}, over after ${ms(since(start))}`,
    codes.every((code) => code === 'TRANSFER_TIMEOUT' || code === 'PEER_LOST'),
  );
  while (transport.ending > 0 && since(start) < 15_000)
    await new Promise((resolve) => setTimeout(resolve, 20));
  row('their aborts returned', `after ${ms(since(start))} (${transport.ending} open)`);

  const again = new Peer(1, 16);
  await again.ready;
  const reopened = await open(transport, again, 5);
  const receiving = again.ask({ do: 'receive', pair: 5, regions: [64 * MIB], count: 1, timeoutMs: 5_000 });
  const content = randomBytes(64 * MIB);
  upload(device, sliceMemory(arena, 0, content.length), content);
  await reopened.pair.send([sliceMemory(arena, 0, content.length)], { tensorId: 'again', timeoutMs: 5_000 });
  await receiving;
  const { hash } = await again.ask({ do: 'hash', bytes: content.length });
  row(
    'a restarted peer is served again',
    `opened in ${ms(reopened.milliseconds)}`,
    hash === createHash('sha256').update(content).digest('hex'),
  );

  start = performance.now();
  const closing = again.ask({ do: 'close', pair: 5 });
  reopened.pair.abort(new PdError('PAIR_CLOSED', 'check'));
  await Promise.all([closing, reopened.pair.over]);
  row('closed on both ends', `over after ${ms(since(start))}`);
  await again.ask({ do: 'quit' });

  // an abort while a long computation runs on the same GPU
  const layout: PagedLayout = {
    family: 'mla',
    numBlocks: 16_384,
    blockSize: 16,
    heads: 1,
    headDim: 2_048,
    dtype: 'bfloat16',
  };
  const cache = { memory: device.allocate(layerBytes(layout), 'cache'), layout };
  const tensor = device.allocate(layerBytes(layout), 'tensor');
  const ids = Int32Array.from({ length: layout.numBlocks }, (_, i) => i);
  const compute = device.createStream();
  const held = await open(transport, first, 6);
  start = performance.now();
  for (let i = 0; i < 3_000; i++) device.gather(tensor, cache, ids, compute);
  const behind = await held.pair
    .receive([big], { tensorId: 'behind', timeoutMs: 300 })
    .catch((error) => PdError.from(error));
  await held.pair.over;
  const overAfter = since(start);
  await drained(device, compute);
  const computed = since(start);
  row(
    'receive times out behind a long computation',
    `${behind?.code}, over after ${ms(overAfter)}, computation done after ${ms(computed)}`,
    behind?.code === 'TRANSFER_TIMEOUT',
  );
}

/** The copy engines, GPU 0 to GPU 1 in one process: a ceiling for any transport. */
async function peerCopy(device: CudaDevice): Promise<void> {
  const other = await createCudaDevice(1);
  const bytes = Math.min(1_024 * MIB, ARENA);
  const target = other.allocate(bytes, 'peer copy');
  const source = device.allocate(bytes, 'peer copy');
  const link = device.runtime.peerLink(0, 1);
  device.enter();
  if (link !== 'none') device.runtime.enablePeerAccess(1);
  const stream = device.createStream();
  let start = performance.now();
  for (let i = 0; i < 12; i++) {
    if (i === 2) {
      await drained(device, stream);
      start = performance.now();
    }
    device.runtime.memcpyPeerAsync(target, source, bytes, stream.handle);
  }
  await drained(device, stream);
  const each = (performance.now() - start) / 10;
  row(`peer copy of ${bytes / MIB} MiB (${link})`, `${ms(each)} ${(bytes / each / 1e6).toFixed(0)} GB/s`);
  other.dispose();
}

/** Four pairs opened at once, transfers of 256 MiB in crossing order. */
async function crossing(transport: NcclTransport, peer: Peer, arena: MemoryRef): Promise<void> {
  let start = performance.now();
  const numbers = [20, 21, 22, 23];
  const opened = await Promise.all(numbers.map((number) => open(transport, peer, number)));
  row('4 pairs opened at once', ms(performance.now() - start));
  start = performance.now();
  const bytes = Math.min(256 * MIB, ARENA);
  const source = sliceMemory(arena, 0, bytes);
  const sends = opened.map(({ pair }) => pair.send([source], { tensorId: 'crossing', timeoutMs: 10_000 }));
  const receives = numbers
    .toReversed()
    .map((pair) => peer.ask({ do: 'receive', pair, regions: [bytes], count: 1, timeoutMs: 10_000 }));
  const errors = (await Promise.all(receives)).map(({ error }) => error ?? '').join('');
  await Promise.all(sends);
  row(
    'one send on each, received in reverse order',
    `${ms(performance.now() - start)} ${errors}`,
    errors === '',
  );
}

const device = await createCudaDevice(0);
const transport = await createNcclTransport(device, {
  bindHost: '127.0.0.1',
  announceHost: '127.0.0.1',
  ncclNumChannels: 16,
});
row(
  'GPU',
  `${device.driver.deviceName(0)}, sm_${device.target.major}${device.target.minor}, ${device.multiProcessors} multiprocessors`,
);
row('driver', `${device.driver.driverVersion()} ${libraryFile(device.driver.library)}`);
row('CUDA runtime', `${device.runtime.version()} ${libraryFile(device.runtime.library)}`);
row('NCCL', `${formatNcclVersion(transport.nccl.version)} ${libraryFile(transport.nccl.library)}`);
if (wants('kernels')) {
  await kernels(device);
}
if (wants('speed')) {
  await kernelSpeed(device);
  await peerCopy(device);
}
if (wants('pair') || wants('faults') || wants('speed')) {
  const arena = device.allocate(ARENA, 'check');
  const peer = new Peer(1, 16);
  await peer.ready;
  if (wants('pair')) {
    await exchange(device, transport, peer, arena);
    await crossing(transport, peer, arena);
  }
  if (wants('speed')) {
    await speed(transport, peer, arena, 16);
    const wide = new Peer(1, 32);
    await wide.ready;
    const wideTransport = await createNcclTransport(device, {
      bindHost: '127.0.0.1',
      announceHost: '127.0.0.1',
      ncclNumChannels: 32,
    });
    await speed(wideTransport, wide, arena, 32);
    await Promise.all([wideTransport.dispose(), wide.ask({ do: 'quit' })]);
  }
  if (wants('faults')) await faults(device, transport, peer, arena);
  const start = performance.now();
  await Promise.all([transport.dispose(), peer.ask({ do: 'quit' })]);
  row('disposed', `in ${ms(performance.now() - start)}`);
}
await transport.dispose();
device.dispose();
console.log(failures === 0 ? 'all as it should be' : `${failures} FAILED`);
process.exitCode = failures === 0 ? 0 : 1;
