/** Two processes, as in real use: one transport each, over stand-ins that talk through sockets. */
import { fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeAll, expect, test } from 'vitest';
import type { CudaDevice } from '../../../src/device/cuda/device.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import { createNcclTransport, type NcclTransport } from '../../../src/transport/nccl/transport.ts';
import { useStandIns } from '../../stand-ins/build.ts';
import { NcclPeer } from '../../support/nccl-peer.ts';

const MIB = 2 ** 20;
let device: CudaDevice;
let transport: NcclTransport;
const peers: NcclPeer[] = [];

beforeAll(async () => {
  useStandIns();
  device = await createCudaDevice(0);
  transport = await createNcclTransport(device, {
    bindHost: '127.0.0.1',
    announceHost: '127.0.0.1',
    ncclNumChannels: 8,
  });
});
afterEach(async () => {
  await Promise.all(peers.splice(0).map((peer) => peer.kill()));
});

async function startPeer(env: Record<string, string> = {}): Promise<NcclPeer> {
  const peer = new NcclPeer(1, 8, env);
  peers.push(peer);
  await peer.ready;
  return peer;
}

async function open(peer: NcclPeer, number: number) {
  const uniqueId = transport.createUniqueId();
  const [pair, answer] = await Promise.all([
    transport.open({ uniqueId, rank: 0, peer: 'child', timeoutMs: 60_000 }),
    peer.ask({ do: 'open', pair: number, uniqueId, timeoutMs: 60_000 }),
  ]);
  expect(answer.error).toBeUndefined();
  return pair;
}

test('a peer killed in mid-transfer is found at the deadline; the one that takes its place is served', async () => {
  const memory = device.allocate(64 * MIB, 'test');
  const victim = await startPeer();
  const pair = await open(victim, 1);
  void victim.ask({ do: 'receive', pair: 1, regions: [64 * MIB], count: 500, timeoutMs: 60_000 });
  // The first shows that all is well, however slow the machine; what follows is to meet its deadline.
  const sends = Array.from({ length: 500 }, (_, i) =>
    pair.send([memory], { tensorId: 'killed', timeoutMs: i === 0 ? 60_000 : 400 }),
  );
  const outcomes = Promise.allSettled(sends);
  await sends[0];
  await victim.kill();
  const failed = (await outcomes).filter((outcome) => outcome.status === 'rejected');
  expect(failed.length).toBeGreaterThan(0);
  expect(failed[0]!.reason).toMatchObject({ code: 'TRANSFER_TIMEOUT' });
  expect((await pair.over).code).toBe('TRANSFER_TIMEOUT');

  const next = await startPeer();
  const again = await open(next, 1);
  const receiving = next.ask({ do: 'receive', pair: 1, regions: [MIB, 5], count: 1, timeoutMs: 60_000 });
  await again.send(
    [
      { ...memory, bytes: MIB },
      { ...memory, bytes: 5 },
    ],
    { tensorId: 'again', timeoutMs: 60_000 },
  );
  expect((await receiving).error).toBeUndefined();
});

test('ends with different NCCL versions fail with both a code and this version', async () => {
  const peer = await startPeer({ PD_STANDIN_NCCL: '22703' });
  const uniqueId = transport.createUniqueId();
  const asked = peer.ask({ do: 'open', pair: 1, uniqueId, timeoutMs: 60_000 });
  await expect(transport.open({ uniqueId, rank: 0, peer: 'child', timeoutMs: 60_000 })).rejects.toMatchObject(
    {
      code: 'NCCL_ERROR',
      message: expect.stringContaining('NCCL 2.28.9'),
    },
  );
  expect((await asked).error).toContain('NCCL 2.27.3');
});

test('an abort that never returns cannot keep the process: killAfter ends it', async () => {
  const entry = fileURLToPath(new URL('./stuck-process.ts', import.meta.url));
  const child = fork(entry, { execArgv: ['--import', 'tsx'] });
  const signal = await new Promise((resolve) => child.once('exit', (_code, name) => resolve(name)));
  expect(signal).toBe('SIGALRM');
});
