/** The child of a GPU check: does as the parent says, on its own GPU. */
import { createHash } from 'node:crypto';
import { createCudaDevice } from '../../src/device/cuda.ts';
import type { MemoryRef } from '../../src/device/device.ts';
import { sliceMemory } from '../../src/device/memory.ts';
import { EventPoller } from '../../src/device/poller.ts';
import { PdError, unreachable } from '../../src/errors.ts';
import { createNcclTransport } from '../../src/transport/nccl/transport.ts';
import type { Pair } from '../../src/transport/transport.ts';
import type { UniqueId } from '../../src/wire/messages.ts';
import type { Answer, Command } from './rig.ts';

const [index = '1', channels = '16'] = process.argv.slice(2);
const device = await createCudaDevice(Number(index));
const transport = await createNcclTransport(device, {
  bindHost: '127.0.0.1',
  announceHost: '127.0.0.1',
  ncclNumChannels: Number(channels),
});
const arena = device.allocate(Number(process.env['PD_CHECK_ARENA_MIB'] ?? 3_072) * 2 ** 20, 'check');
const pinned = await device.allocatePinned(64 * 2 ** 20, 'check');
const stream = device.createStream();
const poller = new EventPoller();
const pairs = new Map<number, Pair>();

function regionsOf(sizes: readonly number[]): MemoryRef[] {
  let at = 0;
  return sizes.map((bytes) => {
    const region = sliceMemory(arena, at, bytes);
    at += Math.ceil(bytes / 256) * 256;
    return region;
  });
}

async function run(command: Command): Promise<Partial<Answer>> {
  switch (command.do) {
    case 'open': {
      const { uniqueId, timeoutMs } = command;
      const opened = await transport.open({
        uniqueId: uniqueId as UniqueId,
        rank: 1,
        peer: 'parent',
        timeoutMs,
      });
      pairs.set(command.pair, opened);
      return {};
    }
    case 'receive':
    case 'send': {
      const pair = pairs.get(command.pair)!;
      const regions = regionsOf(command.regions);
      const work = Array.from({ length: command.count }, (_, i) => {
        const options = { tensorId: `child ${i}`, timeoutMs: command.timeoutMs };
        return command.do === 'receive' ? pair.receive(regions, options) : pair.send(regions, options);
      });
      await Promise.all(work);
      return {};
    }
    case 'hash': {
      const hash = createHash('sha256');
      for (let at = 0; at < command.bytes; at += pinned.bytes) {
        const part = sliceMemory(pinned, 0, Math.min(pinned.bytes, command.bytes - at));
        device.copy(part, sliceMemory(arena, at, part.bytes), stream);
        await poller.wait(stream.record(), 10_000, 'copy');
        hash.update(device.view(part));
      }
      return { hash: hash.digest('hex') };
    }
    case 'close':
      pairs.get(command.pair)!.abort(new PdError('PAIR_CLOSED', 'check'));
      await pairs.get(command.pair)!.over;
      return {};
    case 'quit':
      await transport.dispose();
      device.dispose();
      setImmediate(() => process.disconnect());
      return {};
    default:
      return unreachable(command, 'command');
  }
}

process.on('message', async ({ id, command }: { id: number; command: Command }) => {
  const start = performance.now();
  let result: Partial<Answer> = {};
  try {
    result = await run(command);
  } catch (error) {
    result = { error: PdError.from(error).message };
  }
  process.send?.({ id, milliseconds: performance.now() - start, ...result });
});
process.send?.({ id: 0 });
