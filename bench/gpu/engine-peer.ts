/** The child of `engines.ts`: one transfer engine on one GPU, told what to do over the process channel. */
import { createHash } from 'node:crypto';
import { DEFAULT_LIMITS, DEFAULT_TIMEOUTS } from '../../src/config/transfer-options.ts';
import { createCudaDevice } from '../../src/device/cuda.ts';
import type { MemoryRef } from '../../src/device/device.ts';
import { sliceMemory } from '../../src/device/memory.ts';
import { EventPoller } from '../../src/device/poller.ts';
import { PdError, unreachable } from '../../src/errors.ts';
import type { HostPort } from '../../src/net/address.ts';
import { TransferEngine } from '../../src/transfer/engine.ts';
import type { TensorId, TransferId } from '../../src/wire/ids.ts';
import type { SendType } from '../../src/wire/messages.ts';

export type EngineCommand =
  /** Sends tensors `<id>#0 ... <id>#<count-1>`, each `bytes` long and taken from the same place, and waits until all have left. */
  | {
      readonly do: 'send';
      readonly id: string;
      readonly count: number;
      readonly bytes: number;
      readonly peer: HostPort;
      readonly order?: 'reverse';
    }
  /** Waits for as many, and then is done with them. */
  | {
      readonly do: 'receive';
      readonly id: string;
      readonly count: number;
      readonly bytes: number;
      readonly peer: HostPort;
      readonly order?: 'reverse';
    }
  | { readonly do: 'memory' }
  | { readonly do: 'quit' };

export interface EngineAnswer {
  readonly id: number;
  readonly error?: string;
  /** On the clock all processes of the machine share, milliseconds. */
  readonly from: number;
  readonly to: number;
  readonly hash?: string;
  readonly gpuUsed?: number;
  readonly resident?: number;
}

const [index = '0', sendType = 'PUT_ASYNC'] = process.argv.slice(2);
const device = await createCudaDevice(Number(index));
const MIB = 2 ** 20;
const source = device.allocate(Number(process.env['PD_CHECK_ARENA_MIB'] ?? 512) * MIB, 'source');
const pinned = await device.allocatePinned(16 * MIB, 'check');
const stream = device.createStream();
const poller = new EventPoller();
const engine = await TransferEngine.create({
  device: `cuda:${index}`,
  bind: { host: '127.0.0.1', port: 0 },
  announceHost: '127.0.0.1',
  rank: 0,
  sendType: sendType as SendType,
  kvBufferSize: Number(process.env['PD_CHECK_BUFFER_MIB'] ?? 4_096) * MIB,
  memPoolSize: 4_096 * MIB,
  ncclNumChannels: 16,
  timeouts: DEFAULT_TIMEOUTS,
  limits: DEFAULT_LIMITS,
  log: { level: (process.env['PD_CHECK_LOG'] as 'warn') ?? 'warn', format: 'json' },
});

const settled = async () => {
  const event = stream.record();
  await poller.wait(event, 10_000, 'copy');
  event.dispose();
};

let last: Promise<unknown> = Promise.resolve();

/** SHA-256 of the first 16 MiB at most. One at a time: they share the buffer. */
function hashOf(memory: MemoryRef): Promise<string> {
  const hash = last.then(() => hashNow(memory));
  last = hash;
  return hash;
}

async function hashNow(memory: MemoryRef): Promise<string> {
  const bytes = Math.min(memory.bytes, pinned.bytes);
  const part = sliceMemory(pinned, 0, bytes);
  device.copy(part, sliceMemory(memory, 0, bytes), stream);
  await settled();
  return createHash('sha256').update(device.view(part)).digest('hex');
}

function names(id: string, count: number, order?: 'reverse'): TensorId[] {
  const made = Array.from({ length: count }, (_, i) => `${id}#${i}` as TensorId);
  return order === 'reverse' ? made.reverse() : made;
}

async function run(command: EngineCommand): Promise<Partial<EngineAnswer>> {
  switch (command.do) {
    case 'send': {
      const { id, count, bytes, peer, order } = command;
      const memory = sliceMemory(source, 0, bytes);
      const start = performance.timeOrigin + performance.now();
      const handles = names(id, count, order).map((tensorId) =>
        engine.send({
          tensorId,
          shape: [bytes],
          dtype: 'uint8',
          source: { kind: 'flat', memory },
          ...(sendType === 'GET' ? {} : { peer }),
        }),
      );
      await Promise.all(handles.map(({ sent }) => sent));
      const to = performance.timeOrigin + performance.now();
      return { from: start, to, hash: await hashOf(memory) };
    }
    case 'receive': {
      const { id, count, peer, order } = command;
      const start = performance.timeOrigin + performance.now();
      const tensors = await Promise.all(
        names(id, count, order).map((tensorId) => engine.receive(tensorId, peer, 60_000)),
      );
      const to = performance.timeOrigin + performance.now();
      const hash = await hashOf(tensors.at(-1)!.memory);
      engine.finish(id as TransferId);
      return { from: start, to, hash };
    }
    case 'memory': {
      const { free, total } = device.runtime.memoryInfo();
      return { gpuUsed: total - free, resident: process.memoryUsage().rss };
    }
    case 'quit':
      await engine.dispose();
      device.dispose();
      setImmediate(() => process.disconnect());
      return {};
    default:
      return unreachable(command, 'command');
  }
}

device.view(pinned).set(crypto.getRandomValues(new Uint8Array(65_536)));
device.copy(sliceMemory(source, 0, 65_536), sliceMemory(pinned, 0, 65_536), stream);
await settled();
process.on('message', async ({ id, command }: { id: number; command: EngineCommand }) => {
  let result: Partial<EngineAnswer>;
  try {
    result = await run(command);
  } catch (error) {
    result = { error: `${PdError.from(error).code}: ${PdError.from(error).message}` };
  }
  process.send?.({ id, from: 0, to: 0, ...result });
});
process.send?.({ id: 0, address: engine.address });
