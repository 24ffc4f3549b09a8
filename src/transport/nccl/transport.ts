/** The transport between GPUs. Lives on the transfer thread; the one owner of its communicators, so it needs no locks. */
import { setNativeDefaults } from '../../../ffi/libc.ts';
import { type Libnccl, loadLibnccl } from '../../../ffi/libnccl.ts';
import { withDeadline } from '../../deferred.ts';
import { CudaDevice } from '../../device/cuda/device.ts';
import type { Device } from '../../device/device.ts';
import { ncclEnvironment } from '../../device/native-env.ts';
import { PollLoop } from '../../device/poller.ts';
import { PdError } from '../../errors.ts';
import type { UniqueId } from '../../wire/messages.ts';
import type { OpenOptions, Pair, Transport } from '../transport.ts';
import { abortsReturned, abortsUnderWay } from './abort.ts';
import { type ProgressGate, progressGate } from './gate.ts';
import { Opening } from './opening.ts';
import { NcclPair } from './pair.ts';

export interface NcclTransportOptions {
  /** Where the KV listener is bound, and what peers are told: by these NCCL's bootstrap chooses its interface. */
  readonly bindHost: string;
  readonly announceHost: string;
  /** Thread blocks per communicator: 16 or 32 on NVLink, 8 on PCIe. */
  readonly ncclNumChannels: number;
}

/** For all aborts together, at the end; milliseconds. */
const DISPOSE_DEADLINE = 3_000;

export class NcclTransport implements Transport {
  readonly kind = 'nccl';
  readonly nccl: Libnccl;
  readonly #device: CudaDevice;
  readonly #channels: number;
  readonly #loop = new PollLoop();
  readonly #gate: ProgressGate;
  readonly #openings = new Set<Opening>();
  readonly #pairs = new Set<NcclPair>();
  #disposing: Promise<void> | undefined;

  constructor(device: CudaDevice, nccl: Libnccl, channels: number) {
    this.#device = device;
    this.nccl = nccl;
    this.#channels = channels;
    this.#gate = progressGate(nccl.concurrent);
  }

  createUniqueId(): UniqueId {
    this.#device.enter();
    return this.nccl.uniqueId() as UniqueId;
  }

  async open(options: OpenOptions): Promise<Pair> {
    if (this.#disposing)
      throw new PdError(
        'ENGINE_CLOSED',
        `opening a pair with ${options.peer}: the transport has been disposed`,
      );
    const parts = { nccl: this.nccl, device: this.#device.index, loop: this.#loop, gate: this.#gate };
    const opening = new Opening(
      { ...parts, channels: this.#channels, enter: () => this.#device.enter() },
      options,
    );
    this.#openings.add(opening);
    try {
      const comm = await opening.done;
      const { rank, peer } = options;
      const pair = new NcclPair({ ...parts, comm, rank, peer, stream: this.#device.createStream() });
      this.#pairs.add(pair);
      void pair.released.then(() => this.#pairs.delete(pair));
      // disposed in the moment between: it ends like the others
      if (this.#disposing) pair.abort(closed());
      return pair;
    } finally {
      this.#openings.delete(opening);
    }
  }

  /** Aborts every pair and waits for them, for 3 s at most. Idempotent. */
  dispose(): Promise<void> {
    this.#disposing ??= this.#end();
    return this.#disposing;
  }

  async #end(): Promise<void> {
    for (const opening of this.#openings) opening.cancel(closed());
    for (const pair of this.#pairs) {
      pair.abort(new PdError('ENGINE_CLOSED', `the pair with ${pair.peer} ends with its transport`));
    }
    const all = Promise.all([...this.#pairs].map((pair) => pair.released)).then(abortsReturned);
    await withDeadline(all, DISPOSE_DEADLINE);
    // An abort that still runs blocks the whole device, and so would the call that frees its memory.
    if (this.#pairs.size > 0 || abortsUnderWay() > 0) this.#device.abandonMemory();
  }
}

function closed(): PdError {
  return new PdError('ENGINE_CLOSED', 'the transport has been disposed');
}

/** Throws LIBRARY_NOT_FOUND or LIBRARY_TOO_OLD; INTERNAL for a device that is not a GPU. */
export async function createNcclTransport(
  device: Device,
  options: NcclTransportOptions,
): Promise<NcclTransport> {
  if (!(device instanceof CudaDevice)) {
    throw new PdError('INTERNAL', `NCCL moves GPU memory; device ${device.name} has none`);
  }
  // Nothing new where the main thread has prepared it; an engine of another thread has nobody else to do it.
  setNativeDefaults(ncclEnvironment(options.bindHost, options.announceHost));
  device.enter();
  return new NcclTransport(device, loadLibnccl(), options.ncclNumChannels);
}
