/** The CUDA driver: its version, modules and launches. Needs a current context, which `Cudart.setDevice` creates. */

import { type CallContext, statusError } from './errors.ts';
import { loadLibrary } from './load.ts';
import { type Bound, bind, type NativeLibrary, row } from './native.ts';
import type { CudaStreamHandle, CuFunctionHandle, CuModuleHandle } from './pointers.ts';

type Out = BigUint64Array | Int32Array;

const CUDA = {
  // CUresult cuInit(unsigned int Flags)
  cuInit: row<[flags: number]>('int(unsigned int)'),
  // CUresult cuDriverGetVersion(int *driverVersion)
  cuDriverGetVersion: row<[version: Out]>('int(void *)'),
  // CUresult cuDeviceGetCount(int *count)
  cuDeviceGetCount: row<[count: Out]>('int(void *)'),
  // CUresult cuDeviceGet(CUdevice *device, int ordinal)
  cuDeviceGet: row<[device: Out, ordinal: number]>('int(void *, int)'),
  // CUresult cuDeviceGetName(char *name, int len, CUdevice dev)
  cuDeviceGetName: row<[name: Uint8Array, length: number, device: number]>('int(void *, int, int)'),
  // CUresult cuModuleLoadData(CUmodule *module, const void *image)
  cuModuleLoadData: row<[module: Out, image: Uint8Array]>('int(void *, void *)'),
  // CUresult cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name)
  cuModuleGetFunction: row<[fn: Out, module: CuModuleHandle, name: string]>(
    'int(void *, void *, const char *)',
  ),
  // CUresult cuFuncSetAttribute(CUfunction hfunc, CUfunction_attribute attrib, int value)
  cuFuncSetAttribute: row<[fn: CuFunctionHandle, attribute: number, value: number]>('int(void *, int, int)'),
  // CUresult cuLaunchKernel(CUfunction f, unsigned int gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ,
  //                         unsigned int sharedMemBytes, CUstream hStream, void **kernelParams, void **extra)
  cuLaunchKernel: row<
    [
      ...[fn: CuFunctionHandle, gridX: number, gridY: number, gridZ: number],
      ...[blockX: number, blockY: number, blockZ: number],
      ...[sharedBytes: number, stream: CudaStreamHandle, params: BigUint64Array, extra: null],
    ]
  >(
    'int(void *, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, void *, void *, void *)',
  ),
  // CUresult cuGetErrorName(CUresult error, const char **pStr)
  cuGetErrorName: row<[error: number, text: [string | null]]>('int(int, _Out_ const char **)'),
  // CUresult cuGetErrorString(CUresult error, const char **pStr)
  cuGetErrorString: row<[error: number, text: [string | null]]>('int(int, _Out_ const char **)'),
} as const;

const SUCCESS = 0;
/** CUDA_ERROR_NO_DEVICE. */
export const NO_DEVICE = 100;
/** CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES. */
const MAX_DYNAMIC_SHARED_BYTES = 8;

/** Threads and blocks of a launch, in one dimension, which is all that our kernels use. */
export interface LaunchShape {
  readonly blocks: number;
  readonly threads: number;
  /** Dynamic shared memory, bytes. */
  readonly sharedBytes?: number;
}

export class Libcuda {
  readonly library: NativeLibrary;
  readonly #call: Bound<typeof CUDA>;
  readonly #out = new BigUint64Array(1);
  readonly #int = new Int32Array(1);

  constructor(library: NativeLibrary) {
    this.library = library;
    this.#call = bind(library, CUDA);
  }

  /** The newest CUDA that the driver supports: 13000 for 13.0. */
  driverVersion(): number {
    this.check(this.#call.cuDriverGetVersion(this.#int), 'cuDriverGetVersion');
    return this.#int[0]!;
  }

  /** Throws CUDA_ERROR if there is no driver or no GPU. */
  init(): void {
    this.check(this.#call.cuInit(0), 'cuInit', { what: 'starting the CUDA driver' });
  }

  deviceCount(): number {
    this.check(this.#call.cuDeviceGetCount(this.#int), 'cuDeviceGetCount');
    return this.#int[0]!;
  }

  deviceName(index: number): string {
    this.check(this.#call.cuDeviceGet(this.#int, index), 'cuDeviceGet', { what: `GPU ${index}` });
    const name = new Uint8Array(128);
    this.check(this.#call.cuDeviceGetName(name, name.length, this.#int[0]!), 'cuDeviceGetName');
    return Buffer.from(name.subarray(0, name.indexOf(0))).toString('utf8');
  }

  /** cubin, or PTX with a final 0. Blocks while any receive waits for its sender, so load before the first pair opens. */
  moduleLoad(image: Uint8Array, what: string): CuModuleHandle {
    this.check(this.#call.cuModuleLoadData(this.#out, image), 'cuModuleLoadData', { what });
    return this.#out[0]! as CuModuleHandle;
  }

  moduleFunction(module: CuModuleHandle, name: string): CuFunctionHandle {
    this.check(this.#call.cuModuleGetFunction(this.#out, module, name), 'cuModuleGetFunction', {
      what: name,
    });
    return this.#out[0]! as CuFunctionHandle;
  }

  /** Lets launches of `fn` use that much dynamic shared memory; required above 48 KiB. */
  allowSharedBytes(fn: CuFunctionHandle, bytes: number, what: string): void {
    const status = this.#call.cuFuncSetAttribute(fn, MAX_DYNAMIC_SHARED_BYTES, bytes);
    this.check(status, 'cuFuncSetAttribute', { what, bytes });
  }

  /** `params`: addresses of the kernel's arguments, which are read before the call returns. */
  launch(fn: CuFunctionHandle, shape: LaunchShape, stream: CudaStreamHandle, params: BigUint64Array): void {
    const { blocks, threads, sharedBytes = 0 } = shape;
    const status = this.#call.cuLaunchKernel(
      fn,
      blocks,
      1,
      1,
      threads,
      1,
      1,
      sharedBytes,
      stream,
      params,
      null,
    );
    this.check(status, 'cuLaunchKernel');
  }

  /** Throws CUDA_ERROR or OUT_OF_DEVICE_MEMORY with the driver's text unless `status` is success. */
  check(status: number, call: string, context: CallContext = {}): void {
    if (status === SUCCESS) return;
    const name: [string | null] = [null];
    const text: [string | null] = [null];
    this.#call.cuGetErrorName(status, name);
    this.#call.cuGetErrorString(status, text);
    const code = status === 2 ? 'OUT_OF_DEVICE_MEMORY' : 'CUDA_ERROR';
    throw statusError(code, call, status, `${name[0] ?? 'unknown'}, ${text[0] ?? 'no text'}`, context);
  }
}

let driver: Libcuda | undefined;

/** This thread's CUDA driver, initialized. Throws LIBRARY_NOT_FOUND or CUDA_ERROR. */
export function loadLibcuda(): Libcuda {
  if (driver) return driver;
  const found = new Libcuda(loadLibrary('cuda'));
  found.init();
  driver = found;
  return driver;
}
