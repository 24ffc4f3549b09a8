/** The program of NcclPeer. */
import { createCudaDevice } from '../../src/device/cuda.ts';
import type { MemoryRef } from '../../src/device/device.ts';
import { sliceMemory } from '../../src/device/memory.ts';
import { PdError, unreachable } from '../../src/errors.ts';
import { createNcclTransport } from '../../src/transport/nccl/transport.ts';
import type { Pair } from '../../src/transport/transport.ts';
import type { UniqueId } from '../../src/wire/messages.ts';
import type { Answer, Command } from './nccl-peer.ts';

const ARENA = 96 * 2 ** 20;

const [index = '1', channels = '16'] = process.argv.slice(2);
const device = await createCudaDevice(Number(index));
const transport = await createNcclTransport(device, {
  bindHost: '127.0.0.1',
  announceHost: '127.0.0.1',
  ncclNumChannels: Number(channels),
});
const arena = device.allocate(ARENA, 'peer');
const pairs = new Map<number, Pair>();

function regionsOf(sizes: readonly number[]): MemoryRef[] {
  let at = 0;
  return sizes.map((bytes) => {
    const region = sliceMemory(arena, at, bytes);
    at += Math.ceil(bytes / 256) * 256;
    return region;
  });
}

async function run(command: Command): Promise<void> {
  switch (command.do) {
    case 'open': {
      const { uniqueId, timeoutMs } = command;
      const options = { uniqueId: uniqueId as UniqueId, rank: 1, peer: 'parent', timeoutMs } as const;
      pairs.set(command.pair, await transport.open(options));
      return;
    }
    case 'receive': {
      const pair = pairs.get(command.pair)!;
      const { count, timeoutMs } = command;
      const regions = regionsOf(command.regions);
      await Promise.all(
        Array.from({ length: count }, (_, i) => pair.receive(regions, { tensorId: `child ${i}`, timeoutMs })),
      );
      return;
    }
    case 'quit':
      await transport.dispose();
      device.dispose();
      setImmediate(() => process.disconnect());
      return;
    default:
      unreachable(command, 'command');
  }
}

process.on('message', async ({ id, command }: { id: number; command: Command }) => {
  const answer: Answer = await run(command).then(
    () => ({ id }),
    (error: unknown) => ({ id, error: PdError.from(error).message }),
  );
  process.send?.(answer);
});
process.send?.({ id: 0 });
