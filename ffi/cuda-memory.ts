/**
 * The driver's virtual memory management: physical memory of a GPU, which a descriptor passes to other processes, and the addresses where
 * it is mapped. Needs a current context; the runtime's primary one will do (`Cudart.setDevice`). Mappings belong to the process, so all
 * of its threads can use them. Unmapping does not wait for kernels: one that still runs there faults, which destroys the context.
 */
import { type Libcuda, loadLibcuda } from './libcuda.ts';
import { type Bound, bind, row } from './native.ts';
import type { CuMemoryHandle, DevicePointer, FileDescriptor } from './pointers.ts';

type Out = BigUint64Array | Int32Array;

const CUDA_MEMORY = {
  // CUresult cuDeviceGetAttribute(int *pi, CUdevice_attribute attrib, CUdevice dev)
  cuDeviceGetAttribute: row<[value: Out, attribute: number, device: number]>('int(void *, int, int)'),
  // CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop, CUmemAllocationGranularity_flags option)
  cuMemGetAllocationGranularity:
    row<[granularity: Out, properties: Uint8Array, option: number]>('int(void *, void *, int)'),
  // CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop, unsigned long long flags)
  cuMemCreate: row<[handle: Out, bytes: number, properties: Uint8Array, flags: number]>(
    'int(void *, size_t, void *, unsigned long long)',
  ),
  // CUresult cuMemRelease(CUmemGenericAllocationHandle handle)
  cuMemRelease: row<[handle: CuMemoryHandle]>('int(unsigned long long)'),
  // CUresult cuMemExportToShareableHandle(void *shareableHandle, CUmemGenericAllocationHandle handle,
  //                                       CUmemAllocationHandleType handleType, unsigned long long flags)
  cuMemExportToShareableHandle: row<[fd: Out, handle: CuMemoryHandle, type: number, flags: number]>(
    'int(void *, unsigned long long, int, unsigned long long)',
  ),
  // CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *osHandle, CUmemAllocationHandleType shHandleType)
  cuMemImportFromShareableHandle: row<[handle: Out, fd: bigint, type: number]>('int(void *, void *, int)'),
  // CUresult cuMemAddressReserve(CUdeviceptr *ptr, size_t size, size_t alignment, CUdeviceptr addr, unsigned long long flags)
  cuMemAddressReserve: row<[pointer: Out, bytes: number, alignment: number, address: number, flags: number]>(
    'int(void *, size_t, size_t, unsigned long long, unsigned long long)',
  ),
  // CUresult cuMemAddressFree(CUdeviceptr ptr, size_t size)
  cuMemAddressFree: row<[pointer: DevicePointer, bytes: number]>('int(unsigned long long, size_t)'),
  // CUresult cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags)
  cuMemMap: row<
    [pointer: DevicePointer, bytes: number, offset: number, handle: CuMemoryHandle, flags: number]
  >('int(unsigned long long, size_t, size_t, unsigned long long, unsigned long long)'),
  // CUresult cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count)
  cuMemSetAccess: row<[pointer: DevicePointer, bytes: number, access: Uint8Array, count: number]>(
    'int(unsigned long long, size_t, void *, size_t)',
  ),
  // CUresult cuMemUnmap(CUdeviceptr ptr, size_t size)
  cuMemUnmap: row<[pointer: DevicePointer, bytes: number]>('int(unsigned long long, size_t)'),
} as const;

/** Sizes, offsets and values of <cuda.h>, which test/stand-ins/vmm.c declares too and test/integration/unix.test.ts compares. */
const CUDA_MEMORY_LAYOUTS = {
  /** `id` counts the GPUs that this process sees. */
  CUmemAllocationProp: { size: 32, type: 0, requestedHandleTypes: 4, location_type: 8, location_id: 12 },
  CUmemAccessDesc: { size: 12, location_type: 0, location_id: 4, flags: 8 },
} as const;
const ALLOCATION_PINNED = 1;
const HANDLE_POSIX_DESCRIPTOR = 1;
const LOCATION_DEVICE = 1;
const ACCESS_READ_WRITE = 3;
const GRANULARITY_MINIMUM = 0;
/** CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED. */
const POSIX_DESCRIPTOR_SUPPORTED = 103;

export class CudaMemory {
  readonly #driver: Libcuda;
  readonly #call: Bound<typeof CUDA_MEMORY>;
  readonly #out = new BigUint64Array(1);
  readonly #int = new Int32Array(1);

  constructor(driver: Libcuda) {
    this.#driver = driver;
    this.#call = bind(driver.library, CUDA_MEMORY);
  }

  /** Whether memory of this GPU can be passed to another process by a descriptor. */
  canShare(device: number): boolean {
    const status = this.#call.cuDeviceGetAttribute(this.#int, POSIX_DESCRIPTOR_SUPPORTED, device);
    this.#driver.check(status, 'cuDeviceGetAttribute');
    return this.#int[0] !== 0;
  }

  /** Memory and mappings must be multiples of this many bytes. */
  granularity(device: number): number {
    const status = this.#call.cuMemGetAllocationGranularity(
      this.#out,
      properties(device),
      GRANULARITY_MINIMUM,
    );
    this.#driver.check(status, 'cuMemGetAllocationGranularity');
    return Number(this.#out[0]);
  }

  /** Memory of `device` that can be exported, not mapped yet. Throws OUT_OF_DEVICE_MEMORY. */
  create(device: number, bytes: number, what: string): CuMemoryHandle {
    const status = this.#call.cuMemCreate(this.#out, bytes, properties(device), 0);
    this.#driver.check(status, 'cuMemCreate', { what, bytes });
    return this.#out[0]! as CuMemoryHandle;
  }

  /** Releases the handle; the memory is freed with the last handle, descriptor and mapping. */
  release(handle: CuMemoryHandle): void {
    this.#driver.check(this.#call.cuMemRelease(handle), 'cuMemRelease');
  }

  /** A new descriptor, which the caller closes; the memory exists while it is open. */
  exportDescriptor(handle: CuMemoryHandle, what: string): FileDescriptor {
    const status = this.#call.cuMemExportToShareableHandle(this.#int, handle, HANDLE_POSIX_DESCRIPTOR, 0);
    this.#driver.check(status, 'cuMemExportToShareableHandle', { what });
    return this.#int[0]! as FileDescriptor;
  }

  /** The memory behind a descriptor of another process; the descriptor may be closed afterwards. */
  importDescriptor(fd: FileDescriptor, what: string): CuMemoryHandle {
    const status = this.#call.cuMemImportFromShareableHandle(this.#out, BigInt(fd), HANDLE_POSIX_DESCRIPTOR);
    this.#driver.check(status, 'cuMemImportFromShareableHandle', { what });
    return this.#out[0]! as CuMemoryHandle;
  }

  /** Maps memory for `device`, for reading and writing. Throws CUDA_ERROR if it has fewer than `bytes`, and then leaves nothing mapped. */
  map(device: number, handle: CuMemoryHandle, bytes: number, what: string): DevicePointer {
    const reserved = this.#call.cuMemAddressReserve(this.#out, bytes, 0, 0, 0);
    this.#driver.check(reserved, 'cuMemAddressReserve', { what, bytes });
    const pointer = this.#out[0]! as DevicePointer;
    let mapped = false;
    try {
      this.#driver.check(this.#call.cuMemMap(pointer, bytes, 0, handle, 0), 'cuMemMap', { what, bytes });
      mapped = true;
      const access = this.#call.cuMemSetAccess(pointer, bytes, accessOf(device), 1);
      this.#driver.check(access, 'cuMemSetAccess', { what, bytes });
    } catch (error) {
      // the first error is the one to report
      if (mapped) this.#call.cuMemUnmap(pointer, bytes);
      this.#call.cuMemAddressFree(pointer, bytes);
      throw error;
    }
    return pointer;
  }

  /** Only when no kernel can read or write there any more. Does not wait. */
  unmap(pointer: DevicePointer, bytes: number): void {
    this.#driver.check(this.#call.cuMemUnmap(pointer, bytes), 'cuMemUnmap');
    this.#driver.check(this.#call.cuMemAddressFree(pointer, bytes), 'cuMemAddressFree');
  }
}

function properties(device: number): Uint8Array {
  const layout = CUDA_MEMORY_LAYOUTS.CUmemAllocationProp;
  const view = new DataView(new ArrayBuffer(layout.size));
  view.setInt32(layout.type, ALLOCATION_PINNED, true);
  view.setInt32(layout.requestedHandleTypes, HANDLE_POSIX_DESCRIPTOR, true);
  view.setInt32(layout.location_type, LOCATION_DEVICE, true);
  view.setInt32(layout.location_id, device, true);
  return new Uint8Array(view.buffer);
}

function accessOf(device: number): Uint8Array {
  const layout = CUDA_MEMORY_LAYOUTS.CUmemAccessDesc;
  const view = new DataView(new ArrayBuffer(layout.size));
  view.setInt32(layout.location_type, LOCATION_DEVICE, true);
  view.setInt32(layout.location_id, device, true);
  view.setInt32(layout.flags, ACCESS_READ_WRITE, true);
  return new Uint8Array(view.buffer);
}

let memory: CudaMemory | undefined;

/** This thread's. Throws LIBRARY_NOT_FOUND, LIBRARY_TOO_OLD or CUDA_ERROR. */
export function loadCudaMemory(): CudaMemory {
  memory ??= new CudaMemory(loadLibcuda());
  return memory;
}
