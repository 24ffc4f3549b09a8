/**
 * Memory of a GPU that several processes map: whoever makes it exports a descriptor, which a Unix socket passes on.
 *
 * The physical memory lives as long as anyone has it mapped, a process killed with -9 or not. Unmapping waits for no kernel, so whoever
 * unmaps makes sure first that none of its own launches can still run there: one that does faults and ends this process's context.
 */
import { closeSync } from 'node:fs';
import { type CudaMemory, loadCudaMemory } from '../../../ffi/cuda-memory.ts';
import type { CuMemoryHandle, DevicePointer, FileDescriptor } from '../../../ffi/pointers.ts';
import { closeOnExec } from '../../../ffi/unix.ts';
import { PdError } from '../../errors.ts';
import type { MemoryRef } from '../device.ts';
import type { CudaDevice } from './device.ts';

export class SharedMemory {
  readonly memory: MemoryRef & { readonly kind: 'cuda' };
  readonly #device: CudaDevice;
  readonly #calls: CudaMemory;
  readonly #handle: CuMemoryHandle;
  readonly #mapped: number;
  #descriptor: FileDescriptor | undefined;
  #disposed = false;

  private constructor(
    device: CudaDevice,
    calls: CudaMemory,
    handle: CuMemoryHandle,
    pointer: DevicePointer,
    bytes: number,
    mapped: number,
  ) {
    this.#device = device;
    this.#calls = calls;
    this.#handle = handle;
    this.#mapped = mapped;
    this.memory = { kind: 'cuda', device: device.index, pointer, bytes };
  }

  /**
   * New memory of `device`, rounded up to what the GPU maps (2 MiB). Throws OUT_OF_DEVICE_MEMORY with what is free, and DEVICE_UNAVAILABLE where
   * this GPU's memory cannot be passed on.
   */
  static create(device: CudaDevice, bytes: number, what: string): SharedMemory {
    device.enter();
    const calls = loadCudaMemory();
    if (!calls.canShare(device.index))
      throw new PdError(
        'DEVICE_UNAVAILABLE',
        `${what}: memory of ${device.name} cannot be shared by descriptor`,
      );
    const mapped = roundUp(bytes, calls.granularity(device.index));
    let handle: CuMemoryHandle;
    try {
      handle = calls.create(device.index, mapped, what);
    } catch (error) {
      throw device.noMemory(error, bytes, what);
    }
    return SharedMemory.#mappedBy(device, calls, handle, bytes, mapped, what);
  }

  /**
   * Maps the memory behind a descriptor of another process for `device`, whichever GPU it is on. The descriptor may be closed then. Throws
   * CUDA_ERROR where it is no such memory, has fewer than `bytes` bytes, or `device` does not reach it.
   */
  static map(device: CudaDevice, fd: FileDescriptor, bytes: number, what: string): SharedMemory {
    device.enter();
    const calls = loadCudaMemory();
    const handle = calls.importDescriptor(fd, what);
    const mapped = roundUp(bytes, calls.granularity(device.index));
    return SharedMemory.#mappedBy(device, calls, handle, bytes, mapped, what);
  }

  static #mappedBy(
    device: CudaDevice,
    calls: CudaMemory,
    handle: CuMemoryHandle,
    bytes: number,
    mapped: number,
    what: string,
  ): SharedMemory {
    try {
      return new SharedMemory(
        device,
        calls,
        handle,
        calls.map(device.index, handle, mapped, what),
        bytes,
        mapped,
      );
    } catch (error) {
      calls.release(handle);
      throw error;
    }
  }

  /** One descriptor for every peer, open until `dispose`. */
  get descriptor(): FileDescriptor {
    if (this.#disposed) throw new PdError('INTERNAL', 'shared memory has been disposed');
    if (this.#descriptor === undefined) {
      this.#device.enter();
      this.#descriptor = this.#calls.exportDescriptor(this.#handle, 'exporting the KV cache');
      // a child that inherited it would hold the memory
      closeOnExec(this.#descriptor);
    }
    return this.#descriptor;
  }

  /** Idempotent. Unmaps at once and waits for nothing: every launch of this process that touches the memory must have ended. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    if (this.#descriptor !== undefined) closeSync(this.#descriptor);
    this.#device.enter();
    this.#calls.unmap(this.memory.pointer, this.#mapped);
    this.#calls.release(this.#handle);
  }
}

function roundUp(bytes: number, step: number): number {
  return Math.ceil(bytes / step) * step;
}
