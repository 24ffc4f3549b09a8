/** Creating and slicing MemoryRefs. */
import { PdError } from '../errors.ts';
import type { DevicePointer, EventRef, MemoryRef, PinnedPointer } from './device.ts';

/** Zeroed memory of this process that any thread reaches. The system commits pages as they are touched. */
export function hostMemory(bytes: number): MemoryRef & { readonly kind: 'host' } {
  return { kind: 'host', buffer: new SharedArrayBuffer(bytes), offset: 0, bytes };
}

/** Memory of GPU `device` at an address of your own CUDA code. It stays yours: free it only once nothing here uses it any more. */
export function cudaMemory(
  device: number,
  pointer: bigint,
  bytes: number,
): MemoryRef & { readonly kind: 'cuda' } {
  return { kind: 'cuda', device, pointer: pointer as DevicePointer, bytes };
}

/** Page-locked host memory (cudaHostAlloc, cudaHostRegister) at an address of your own. It stays yours. */
export function pinnedMemory(pointer: bigint, bytes: number): MemoryRef & { readonly kind: 'pinned' } {
  return { kind: 'pinned', pointer: pointer as PinnedPointer, bytes };
}

/** A `cudaEvent_t` of your own, recorded behind the work that writes the source. It stays yours, until the send is gathered. */
export function cudaEvent(handle: bigint): EventRef {
  return { kind: 'cuda', handle };
}

/** `length` bytes of `memory` from `offset`. Throws INTERNAL where that is outside. */
export function sliceMemory(memory: MemoryRef, offset: number, length: number): MemoryRef {
  const fits =
    Number.isSafeInteger(offset) &&
    Number.isSafeInteger(length) &&
    offset >= 0 &&
    length >= 0 &&
    offset + length <= memory.bytes;
  if (!fits) {
    throw new PdError('INTERNAL', `bytes ${offset}+${length} are outside of memory of ${memory.bytes} bytes`);
  }
  switch (memory.kind) {
    case 'host':
      return { kind: 'host', buffer: memory.buffer, offset: memory.offset + offset, bytes: length };
    case 'pinned':
      return { kind: 'pinned', pointer: (memory.pointer + BigInt(offset)) as PinnedPointer, bytes: length };
    case 'cuda':
      return {
        kind: 'cuda',
        device: memory.device,
        pointer: (memory.pointer + BigInt(offset)) as DevicePointer,
        bytes: length,
      };
  }
}

/** The same memory as elements of four bytes. */
export function int32View({ buffer, byteOffset, byteLength }: Uint8Array): Int32Array {
  return new Int32Array(buffer, byteOffset, byteLength / 4);
}

export function float32View({ buffer, byteOffset, byteLength }: Uint8Array): Float32Array {
  return new Float32Array(buffer, byteOffset, byteLength / 4);
}

/** Bytes of all regions together. */
export function totalBytes(regions: readonly MemoryRef[]): number {
  return regions.reduce((sum, region) => sum + region.bytes, 0);
}

/** A view of host memory, without a copy. Throws INTERNAL for other kinds. */
export function hostView(memory: MemoryRef): Uint8Array {
  if (memory.kind !== 'host') {
    throw new PdError('INTERNAL', `${memory.kind} memory cannot be read as host memory`);
  }
  return new Uint8Array(memory.buffer, memory.offset, memory.bytes);
}
