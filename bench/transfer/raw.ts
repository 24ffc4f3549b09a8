/** Ceilings, measured in the same run: the bare transport between two peers, and the device's own memory copy. */
import type { CudaDevice } from '../../src/device/cuda/device.ts';
import type { Device, MemoryRef } from '../../src/device/device.ts';
import { hostMemory, hostView, sliceMemory } from '../../src/device/memory.ts';
import type { EventPoller } from '../../src/device/poller.ts';
import { PdError } from '../../src/errors.ts';
import { createTransport } from '../../src/transport/create-transport.ts';
import type { Pair, Transport } from '../../src/transport/transport.ts';
import type { UniqueId } from '../../src/wire/messages.ts';
import { monotonicMs } from '../measure/machine.ts';

const LOOPBACK = '127.0.0.1';
const OPEN_TIMEOUT_MS = 30_000;
const TRANSFER_TIMEOUT_MS = 30_000;

export class RawTransport {
  readonly #device: Device;
  readonly #channels: number;
  readonly #area: MemoryRef;
  #transport: Transport | undefined;
  #pair: Pair | undefined;

  /** The regions that are sent and received are cut from `area`, one after another. */
  constructor(device: Device, channels: number, area: MemoryRef) {
    this.#device = device;
    this.#channels = channels;
    this.#area = area;
  }

  async createUniqueId(): Promise<UniqueId> {
    return (await this.#open()).createUniqueId();
  }

  async open(uniqueId: Uint8Array, rank: 0 | 1): Promise<void> {
    const transport = await this.#open();
    this.#pair = await transport.open({
      uniqueId: uniqueId as UniqueId,
      rank,
      peer: `rank ${1 - rank} of the benchmark`,
      timeoutMs: OPEN_TIMEOUT_MS,
    });
  }

  /** One grouped operation per round, each after the last has ended. Returns when each began (send) or ended (receive). */
  async move(what: 'raw-send' | 'raw-receive', sizes: readonly number[], rounds: number): Promise<number[]> {
    const pair = this.#pair;
    if (!pair) throw new PdError('INTERNAL', 'the raw pair has not been opened');
    let at = 0;
    const regions = sizes.map((bytes) => {
      at += bytes;
      return sliceMemory(this.#area, at - bytes, bytes);
    });
    const options = { tensorId: 'raw', timeoutMs: TRANSFER_TIMEOUT_MS };
    const times: number[] = [];
    for (let round = 0; round < rounds; round++) {
      if (what === 'raw-send') {
        times.push(monotonicMs());
        await pair.send(regions, options);
      } else {
        await pair.receive(regions, options);
        times.push(monotonicMs());
      }
    }
    return times;
  }

  async dispose(): Promise<void> {
    await this.#transport?.dispose();
  }

  async #open(): Promise<Transport> {
    this.#transport ??= await createTransport(this.#device, {
      bindHost: LOOPBACK,
      announceHost: LOOPBACK,
      ncclNumChannels: this.#channels,
    });
    return this.#transport;
  }
}

/** Milliseconds for each copy of `bytes` of `source` to other memory: by the copy engine to another GPU, by memcpy on the host. */
export async function deviceCopy(
  device: Device,
  source: MemoryRef,
  target: string,
  bytes: number,
  rounds: number,
  poller: EventPoller,
): Promise<number[]> {
  const once =
    device.kind === 'host'
      ? hostCopy(source, bytes)
      : await peerCopy(device as CudaDevice, source, target, bytes, poller);
  const times: number[] = [];
  for (let round = 0; round < rounds; round++) {
    const start = monotonicMs();
    await once();
    times.push(monotonicMs() - start);
  }
  return times;
}

function hostCopy(source: MemoryRef, bytes: number): () => Promise<void> {
  const target = hostView(hostMemory(bytes));
  const from = hostView(sliceMemory(source, 0, bytes));
  return async () => target.set(from);
}

/** One process that sees both GPUs; between processes the same copy goes through memory opened by CUDA IPC, over the same links. */
async function peerCopy(
  device: CudaDevice,
  source: MemoryRef,
  target: string,
  bytes: number,
  poller: EventPoller,
): Promise<() => Promise<void>> {
  // loaded here, so that a machine without a GPU needs none of its libraries
  const { createCudaDevice } = await import('../../src/device/cuda.ts');
  const other = await createCudaDevice(Number(target.replace('cuda:', '')));
  const memory = other.allocate(bytes, 'the peer copy');
  device.enter();
  if (!device.runtime.canAccessPeer(device.index, other.index)) {
    throw new PdError('DEVICE_UNAVAILABLE', `${device.name} cannot access the memory of ${other.name}`);
  }
  device.runtime.enablePeerAccess(other.index);
  const from = sliceMemory(source, 0, bytes);
  if (from.kind !== 'cuda') throw new PdError('INTERNAL', 'a peer copy starts in GPU memory');
  const stream = device.createStream();
  return async () => {
    device.enter();
    const to = { device: other.index, pointer: memory.pointer };
    device.runtime.memcpyPeerAsync(to, { device: device.index, pointer: from.pointer }, bytes, stream.handle);
    const event = stream.record();
    await poller.wait(event, TRANSFER_TIMEOUT_MS, 'the peer copy');
    event.dispose();
  };
}
