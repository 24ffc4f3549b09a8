import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { CudaDevice } from '../../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import type { MemoryRef } from '../../../src/device/device.ts';
import { hostMemory, hostView, sliceMemory } from '../../../src/device/memory.ts';
import { PdError } from '../../../src/errors.ts';
import { abortsUnderWay } from '../../../src/transport/nccl/abort.ts';
import { createNcclTransport, type NcclTransport } from '../../../src/transport/nccl/transport.ts';
import type { Pair } from '../../../src/transport/transport.ts';
import type { UniqueId } from '../../../src/wire/messages.ts';
import { type StandIns, useStandIns } from '../../stand-ins/build.ts';

const MIB = 2 ** 20;
let standIns: StandIns;
let devices: readonly [CudaDevice, CudaDevice];
let left: NcclTransport;
let right: NcclTransport;

beforeAll(async () => {
  standIns = useStandIns();
  devices = [await createCudaDevice(0), await createCudaDevice(1)];
});
beforeEach(async () => {
  const options = { bindHost: '127.0.0.1', announceHost: '127.0.0.1', ncclNumChannels: 16 };
  left = await createNcclTransport(devices[0], options);
  right = await createNcclTransport(devices[1], options);
});
afterEach(async () => {
  standIns.faults('');
  await Promise.all([left.dispose(), right.dispose()]);
  await Promise.all([left.dispose(), right.dispose()]);
});
afterAll(() => {
  for (const device of devices) device.dispose();
});

function fill(device: CudaDevice, bytes: number, seed: number): MemoryRef {
  const memory = device.allocate(bytes, 'test');
  const host = hostMemory(bytes);
  hostView(host).set(Uint8Array.from({ length: bytes }, (_, i) => (i * 7 + (i >> 9) + seed) & 255));
  const stream = device.createStream();
  device.copy(memory, host, stream);
  stream.dispose();
  return memory;
}

function read(device: CudaDevice, memory: MemoryRef): Uint8Array {
  const host = hostMemory(memory.bytes);
  const stream = device.createStream();
  device.copy(host, memory, stream);
  stream.dispose();
  return hostView(host);
}

async function openPair(timeoutMs = 60_000): Promise<readonly [Pair, Pair]> {
  const uniqueId = left.createUniqueId();
  return Promise.all([
    left.open({ uniqueId, rank: 0, peer: '10.0.0.2:2', timeoutMs }),
    right.open({ uniqueId, rank: 1, peer: '10.0.0.1:1', timeoutMs }),
  ]);
}

const options = (tensorId: string, timeoutMs = 60_000) => ({ tensorId, timeoutMs });

describe('a pair', () => {
  test('carries operations in order, with several regions each, in GPU and in page-locked memory', async () => {
    const [a, b] = await openPair();
    const sources = [1, 2, 3].map((seed) => fill(devices[0], MIB + seed, seed));
    const target = devices[1].allocate(MIB + 1, 'test');
    const pinned = await devices[1].allocatePinned(2 * MIB + 5, 'test');
    const sends = [a.send([sources[0]!], options('one')), a.send([sources[1]!, sources[2]!], options('two'))];
    expect(a.pending).toBe(2);
    const receives = [
      b.receive([target], options('one')),
      b.receive([sliceMemory(pinned, 0, MIB + 2), sliceMemory(pinned, MIB + 2, MIB + 3)], options('two')),
    ];
    await Promise.all([...sends, ...receives]);
    expect(Buffer.compare(read(devices[1], target), read(devices[0], sources[0]!))).toBe(0);
    const both = Buffer.concat([read(devices[0], sources[1]!), read(devices[0], sources[2]!)]);
    expect(Buffer.compare(devices[1].view(pinned), both)).toBe(0);
    expect(a.pending + b.pending).toBe(0);
  });

  test('carries a thousand small operations both ways on two pairs', async () => {
    const [[a, b], [c, d]] = await Promise.all([openPair(), openPair()]);
    const outgoing = fill(devices[0], 4096, 3);
    const incoming = fill(devices[1], 4096, 9);
    const here = devices[0].allocate(4096, 'test');
    const there = devices[1].allocate(4096, 'test');
    const work: Promise<void>[] = [];
    for (let i = 0; i < 500; i++) {
      work.push(a.send([outgoing], options(`a${i}`)), b.receive([there], options(`a${i}`)));
      work.push(d.send([incoming], options(`d${i}`)), c.receive([here], options(`d${i}`)));
    }
    await Promise.all(work);
    expect(Buffer.compare(read(devices[1], there), read(devices[0], outgoing))).toBe(0);
    expect(Buffer.compare(read(devices[0], here), read(devices[1], incoming))).toBe(0);
  });

  test('keeps the order of operations that go both ways', async () => {
    const [a, b] = await openPair();
    const source = fill(devices[0], 64, 1);
    const back = fill(devices[1], 48, 2);
    const [there, home] = [devices[1].allocate(64, 'test'), devices[0].allocate(48, 'test')];
    const work: Promise<void>[] = [];
    for (let i = 0; i < 40; i++) {
      const forth = i % 5 !== 4;
      work.push(forth ? a.send([source], options(`${i}`)) : a.receive([home], options(`${i}`)));
      work.push(forth ? b.receive([there], options(`${i}`)) : b.send([back], options(`${i}`)));
    }
    await Promise.all(work);
    expect(Buffer.compare(read(devices[1], there), read(devices[0], source))).toBe(0);
    expect(Buffer.compare(read(devices[0], home), read(devices[1], back))).toBe(0);
  });

  test('of its own stream: transfers of two pairs in crossing order do not deadlock', async () => {
    const [[a, b], [c, d]] = await Promise.all([openPair(), openPair()]);
    const from = fill(devices[0], 4 * MIB, 1);
    const to = devices[1].allocate(4 * MIB, 'test');
    const first = [a.send([from], options('x')), c.send([from], options('y'))];
    const waitForCrossing = d.receive([to], options('y'));
    await waitForCrossing;
    await Promise.all([b.receive([to], options('x')), ...first]);
  });

  test('an empty operation needs no peer', async () => {
    const [a] = await openPair();
    await a.send([sliceMemory(devices[0].allocate(16, 'test'), 0, 0)], options('empty'));
  });

  test('closes on both ends', async () => {
    const [a, b] = await openPair();
    const reason = new PdError('PAIR_CLOSED', 'idle');
    a.abort(reason);
    b.abort(reason);
    b.abort(new PdError('PEER_LOST', 'too late to count'));
    expect((await a.over).code).toBe('PAIR_CLOSED');
    expect((await b.over).message).toBe('idle');
    await expect(a.send([fill(devices[0], 8, 1)], options('late'))).rejects.toMatchObject({
      code: 'PAIR_CLOSED',
    });
  });
});

describe('an operation that its peer does not meet', () => {
  test('ends at its deadline, with all that stood behind it, and only its own pair', async () => {
    const [[a], [c, d]] = await Promise.all([openPair(), openPair()]);
    const memory = fill(devices[0], MIB, 1);
    const stuck = a.send([memory], options('req#layer.0', 200));
    const behind = a.send([memory], options('req#layer.1', 200));
    await expect(stuck).rejects.toMatchObject({
      code: 'TRANSFER_TIMEOUT',
      message: expect.stringMatching(
        /send of req#layer.0 \(1048576 bytes.*10\.0\.0\.2:2 did not receive.*200 ms; 1 more stood behind/,
      ),
    });
    await expect(behind).rejects.toMatchObject({ code: 'TRANSFER_TIMEOUT' });
    expect((await a.over).code).toBe('TRANSFER_TIMEOUT');
    const target = devices[1].allocate(MIB, 'test');
    await Promise.all([c.send([memory], options('next')), d.receive([target], options('next'))]);
  });

  test('its memory is free when the pair is over, though another abort still blocks the device', async () => {
    standIns.faults('ncclCommAbort=hang');
    const [a] = await openPair();
    const target = devices[0].allocate(MIB, 'test');
    const receive = a.receive([target], options('t', 100));
    await expect(receive).rejects.toMatchObject({ code: 'TRANSFER_TIMEOUT' });
    expect((await a.over).code).toBe('TRANSFER_TIMEOUT');
    expect(abortsUnderWay()).toBe(1);
    // what the end of the device must not do now is to wait for that abort
    standIns.faults('ncclCommAbort=hang,cudaFree=hang');
    const device = await createCudaDevice(0);
    device.allocate(64, 'test');
    const transport = await createNcclTransport(device, {
      bindHost: '127.0.0.1',
      announceHost: '127.0.0.1',
      ncclNumChannels: 8,
    });
    await transport.dispose();
    device.dispose();
  });
});

describe('opening', () => {
  test('without a peer ends at its deadline and names the version both ends need', async () => {
    const uniqueId = left.createUniqueId();
    await expect(left.open({ uniqueId, rank: 0, peer: '10.0.0.9:9', timeoutMs: 100 })).rejects.toMatchObject({
      code: 'PAIR_INIT_TIMEOUT',
      message: expect.stringMatching(/10\.0\.0\.9:9 as rank 0.*no peer within 100 ms.*NCCL 2\.28\.9/),
    });
    const [a, b] = await openPair();
    const memory = fill(devices[0], 64, 1);
    await Promise.all([
      a.send([memory], options('t')),
      b.receive([devices[1].allocate(64, 'test')], options('t')),
    ]);
  });

  test('two ranks on one GPU are refused in words', async () => {
    const uniqueId = left.createUniqueId();
    const both = [0, 1].map((rank) =>
      left.open({ uniqueId, rank: rank as 0 | 1, peer: '10.0.0.2:2', timeoutMs: 60_000 }),
    );
    for (const result of await Promise.allSettled(both)) {
      expect(result).toMatchObject({ status: 'rejected', reason: { code: 'NCCL_ERROR' } });
      expect((result as PromiseRejectedResult).reason.message).toMatch(
        /failed with 5: invalid usage \(are both ends on one GPU\?/,
      );
    }
  });

  test('an id that is not one is refused', async () => {
    const uniqueId = new Uint8Array(100) as UniqueId;
    await expect(left.open({ uniqueId, rank: 1, peer: 'p:1', timeoutMs: 60_000 })).rejects.toMatchObject({
      code: 'MESSAGE_INVALID',
    });
  });

  test('is cancelled by dispose, within its bound', async () => {
    const opening = left.open({ uniqueId: left.createUniqueId(), rank: 0, peer: 'p:1', timeoutMs: 60_000 });
    const outcome = expect(opening).rejects.toMatchObject({ code: 'ENGINE_CLOSED' });
    await left.dispose();
    await outcome;
  });
});

test('a call that NCCL refuses ends the pair with its text', async () => {
  const [a] = await openPair();
  standIns.faults('ncclSend=3');
  const memory = fill(devices[0], 64, 1);
  await expect(a.send([memory], options('t'))).rejects.toMatchObject({
    code: 'NCCL_ERROR',
    message: expect.stringMatching(/pair with 10\.0\.0\.2:2: t: ncclSend failed with 3: internal error/),
  });
  expect((await a.over).code).toBe('NCCL_ERROR');
});

test('memory that NCCL does not reach is refused without harm to the pair', async () => {
  const [a, b] = await openPair();
  await expect(a.send([hostMemory(8)], options('t'))).rejects.toMatchObject({ code: 'INTERNAL' });
  await expect(a.send([devices[1].allocate(8, 'test')], options('t'))).rejects.toMatchObject({
    code: 'INTERNAL',
  });
  const memory = fill(devices[0], 64, 1);
  await Promise.all([
    a.send([memory], options('t')),
    b.receive([devices[1].allocate(64, 'test')], options('t')),
  ]);
});
