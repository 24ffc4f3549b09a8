/** A paged KV cache in memory that other workers of this host may map and write into: the owner's side. */
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import type { FileDescriptor } from '../../../ffi/pointers.ts';
import type { CudaDevice } from '../../device/cuda/device.ts';
import { SharedMemory } from '../../device/cuda/shared-memory.ts';
import type { NamedLayer } from '../../device/paged-cache.ts';
import { PdError } from '../../errors.ts';
import { layerBytes, type PagedLayout } from '../../kv/layout.ts';
import { type CacheClaims, claimsOf } from './claims.ts';

/** Layers begin at multiples of this many bytes. */
const LAYER_ALIGNMENT = 512;
/** Behind them, for self-tests of peers: what a write of some 0.1 ms fills. No more than the cache itself. */
const SCRATCH_BYTES = 32 * 2 ** 20;

export class ExportedCache {
  readonly layers: readonly NamedLayer[];
  /** What a peer is told along with `descriptor`. */
  readonly claims: CacheClaims;
  readonly #memory: SharedMemory;

  /** Takes one piece of memory for all layers. Throws OUT_OF_DEVICE_MEMORY or DEVICE_UNAVAILABLE. */
  constructor(device: CudaDevice, layout: PagedLayout, names: readonly string[]) {
    const each = Math.ceil(layerBytes(layout) / LAYER_ALIGNMENT) * LAYER_ALIGNMENT;
    const offset = each * names.length;
    const scratch = { offset, bytes: Math.min(SCRATCH_BYTES, offset) };
    this.#memory = SharedMemory.create(device, offset + scratch.bytes, 'the KV cache');
    const { memory } = this.#memory;
    const bytes = layerBytes(layout);
    this.layers = names.map((name, i) => {
      const pointer = (memory.pointer + BigInt(i * each)) as typeof memory.pointer;
      return { name, cache: { memory: { ...memory, pointer, bytes }, layout } };
    });
    const layers = names.map((name, i) => ({ name, offset: i * each }));
    const gpu = {
      busId: device.runtime.pciBusId(device.index),
      name: device.driver.deviceName(device.index),
    };
    this.claims = { ...claimsOf(layout, memory.bytes, layers), scratch, gpu };
  }

  /** To be passed to peers, which map the memory behind it. Stays ours: do not close it. */
  get descriptor(): FileDescriptor {
    return this.#memory.descriptor;
  }

  /**
   * Idempotent. When no stream of ours uses the cache any more. Peers that have it mapped keep its memory in use, and may go on writing into
   * it, until they unmap it: nobody else can see that.
   */
  dispose(): void {
    this.#memory.dispose();
  }
}

/** A process that has a GPU open. */
export interface Holder {
  readonly pid: number;
  readonly command: string;
  /** Started by whoever started this process, as pd-launch starts workers that share a GPU: it holds memory of its own. */
  readonly beside: boolean;
}

/** Time as a wait sees it. */
export interface RetryOptions {
  /** How long memory that others hold is waited for. */
  readonly timeoutMs?: number;
  readonly intervalMs?: number;
  /** Bytes of the GPU that this process has taken already: what it holds itself, no wait brings back. */
  readonly own?: number;
  /** Who else has the GPU open. */
  readonly holders?: () => readonly Holder[];
  /** Called once, when the wait begins. */
  readonly onWait?: (why: string) => void;
  readonly signal?: AbortSignal;
}

/**
 * Makes a cache; where others hold the memory (peers that have the cache of this worker's dead predecessor still mapped), tries again for a
 * minute. Throws OUT_OF_DEVICE_MEMORY that names the processes that have the GPU open, at once where the GPU is too small in any case.
 */
export async function createWhenFree<Cache>(
  device: Pick<CudaDevice, 'index' | 'name' | 'runtime'>,
  create: () => Cache,
  options: RetryOptions = {},
): Promise<Cache> {
  const { timeoutMs = 60_000, intervalMs = 250, own = 0, signal } = options;
  const holders = options.holders ?? (() => gpuHolders(device.runtime.pciBusId(device.index)));
  const deadline = performance.now() + timeoutMs;
  for (let waited = false; ; waited = true) {
    try {
      return create();
    } catch (error) {
      const failed = PdError.from(error);
      if (failed.code !== 'OUT_OF_DEVICE_MEMORY') throw failed;
      const { bytes, total } = failed.context;
      const never = typeof bytes === 'number' && typeof total === 'number' && bytes > total - own;
      if (never) throw failed;
      const why = `${failed.message}; ${named(holders())}`;
      if (performance.now() >= deadline)
        throw new PdError(
          'OUT_OF_DEVICE_MEMORY',
          `${why}; waited ${Math.round(timeoutMs / 1_000)} s for it`,
          failed.context,
          {
            cause: failed,
          },
        );
      if (!waited) options.onWait?.(why);
    }
    signal?.throwIfAborted();
    await new Promise((resolve) => setTimeout(resolve, Math.min(intervalMs, deadline - performance.now())));
    signal?.throwIfAborted();
  }
}

function named(holders: readonly Holder[]): string {
  if (holders.length === 0) return 'no process that can be seen from here has this GPU open';
  const words = ({ pid, command, beside }: Holder) =>
    `${pid} (${command}${beside ? '; started beside this one' : ''})`;
  const list = holders.map(words).join(', ');
  return `${device(holders.length)} this GPU open: ${list}`;
}
function device(count: number): string {
  return count === 1 ? 'one other process has' : `${count} other processes have`;
}

/** Processes other than this one that have the GPU at this PCI address open, as far as /proc shows them. */
function gpuHolders(pciBusId: string): Holder[] {
  return processesWith(new RegExp(`^/dev/nvidia${deviceMinor(pciBusId) ?? '\\d+'}$`));
}

function deviceMinor(pciBusId: string): string | undefined {
  try {
    const file = `/proc/driver/nvidia/gpus/${pciBusId.toLowerCase()}/information`;
    return /Device Minor:\s*(\d+)/.exec(readFileSync(file, 'utf8'))?.[1];
  } catch {
    return undefined;
  }
}

/** Processes other than this one with an open file of such a name. */
export function processesWith(file: RegExp): Holder[] {
  const found: Holder[] = [];
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name) || Number(name) === process.pid || !opens(`/proc/${name}/fd`, file)) continue;
    found.push({ pid: Number(name), command: commandOf(name), beside: parentOf(name) === process.ppid });
  }
  return found;
}

function opens(folder: string, file: RegExp): boolean {
  let names: string[];
  try {
    names = readdirSync(folder);
  } catch {
    // of another user, or gone
    return false;
  }
  return names.some((name) => {
    try {
      return file.test(readlinkSync(`${folder}/${name}`));
    } catch {
      return false;
    }
  });
}

function parentOf(pid: string): number | undefined {
  try {
    return Number(/^PPid:\s*(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]);
  } catch {
    return undefined;
  }
}

function commandOf(pid: string): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').replaceAll('\0', ' ').trim().slice(0, 120);
  } catch {
    return 'gone by now';
  }
}
