/** NCCL 2.26 has room for one communicator in progress per thread; its stand-in loses the first one's work, as the real one does. */
import { expect, test } from 'vitest';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import { createNcclTransport } from '../../../src/transport/nccl/transport.ts';
import { useStandIns } from '../../stand-ins/build.ts';
import { NcclPeer } from '../../support/nccl-peer.ts';

test('several pairs are opened and used, one step at a time', async () => {
  useStandIns();
  process.env['PD_STANDIN_NCCL'] = '22605';
  const device = await createCudaDevice(0);
  const transport = await createNcclTransport(device, {
    bindHost: '127.0.0.1',
    announceHost: '127.0.0.1',
    ncclNumChannels: 8,
  });
  expect(transport.nccl.versionText).toBe('2.26.5');
  const peers = [new NcclPeer(1, 8), new NcclPeer(1, 8)];
  try {
    await Promise.all(peers.map(({ ready }) => ready));
    const open = async (peer: NcclPeer, number: number) => {
      const uniqueId = transport.createUniqueId();
      const [pair, answer] = await Promise.all([
        transport.open({ uniqueId, rank: 0, peer: 'child', timeoutMs: 60_000 }),
        peer.ask({ do: 'open', pair: number, uniqueId, timeoutMs: 60_000 }),
      ]);
      expect(answer.error).toBeUndefined();
      return pair;
    };
    const pairs = await Promise.all(peers.flatMap((peer) => [open(peer, 1), open(peer, 2)]));
    const memory = device.allocate(4096, 'test');
    const receiving = peers.flatMap((peer) =>
      [1, 2].map((pair) => peer.ask({ do: 'receive', pair, regions: [4096], count: 20, timeoutMs: 60_000 })),
    );
    const options = { tensorId: 't', timeoutMs: 60_000 };
    await Promise.all(
      pairs.flatMap((pair) => Array.from({ length: 20 }, () => pair.send([memory], options))),
    );
    for (const { error } of await Promise.all(receiving)) expect(error).toBeUndefined();
    await Promise.all([transport.dispose(), ...peers.map((peer) => peer.ask({ do: 'quit' }))]);
    device.dispose();
  } finally {
    await Promise.all(peers.map((peer) => peer.kill()));
  }
});
