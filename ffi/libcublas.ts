/** cuBLAS, for products of 16-bit matrices with float32 sums. One handle per stream; methods throw CUDA_ERROR with the library's text. */

import { statusError } from './errors.ts';
import { loadLibcuda } from './libcuda.ts';
import { loadLibrary } from './load.ts';
import { type Bound, bind, type NativeLibrary, row } from './native.ts';
import type { CublasHandle, CudaStreamHandle, DevicePointer } from './pointers.ts';

const CUBLAS = {
  // cublasStatus_t cublasCreate_v2(cublasHandle_t *handle)
  cublasCreate_v2: row<[handle: BigUint64Array]>('int(void *)'),
  // cublasStatus_t cublasGetProperty(libraryPropertyType type, int *value)
  cublasGetProperty: row<[type: number, value: Int32Array]>('int(int, void *)'),
  // cublasStatus_t cublasDestroy_v2(cublasHandle_t handle)
  cublasDestroy_v2: row<[handle: CublasHandle]>('int(void *)'),
  // cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t streamId)
  cublasSetStream_v2: row<[handle: CublasHandle, stream: CudaStreamHandle]>('int(void *, void *)'),
  // cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t workspaceSizeInBytes)
  cublasSetWorkspace_v2: row<[handle: CublasHandle, workspace: DevicePointer, bytes: number]>(
    'int(void *, void *, size_t)',
  ),
  // cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode)
  cublasSetMathMode: row<[handle: CublasHandle, mode: number]>('int(void *, int)'),
  // cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
  //   const void *alpha, const void *A, cudaDataType Atype, int lda, const void *B, cudaDataType Btype, int ldb,
  //   const void *beta, void *C, cudaDataType Ctype, int ldc, cublasComputeType_t computeType, cublasGemmAlgo_t algo)
  cublasGemmEx: row<
    [
      ...[handle: CublasHandle, transA: number, transB: number, m: number, n: number, k: number],
      ...[alpha: Float32Array, a: DevicePointer, aType: number, lda: number],
      ...[b: DevicePointer, bType: number, ldb: number],
      ...[beta: Float32Array, c: DevicePointer, cType: number, ldc: number],
      ...[computeType: number, algo: number],
    ]
  >(
    'int(void *, int, int, int, int, int, void *, void *, int, int, void *, int, int, void *, void *, int, int, int, int)',
  ),
  // const char *cublasGetStatusString(cublasStatus_t status)
  cublasGetStatusString: row<[status: number], string | null>('const char *(int)'),
} as const;

/** cudaDataType. */
const TYPES = { float32: 0, float16: 2, bfloat16: 14 } as const;
const COMPUTE_32F = 68;
const OP_N = 0;
const OP_T = 1;
/** Sums of parts (split-K) stay float32 too. */
const DISALLOW_REDUCED_PRECISION_REDUCTION = 16;
const DEFAULT_ALGORITHM = -1;
// libraryPropertyType
const MAJOR_VERSION = 0;
const MINOR_VERSION = 1;

const ONE = Float32Array.of(1);
const ZERO = Float32Array.of(0);

export interface RowProduct {
  /** x [rows, inputs] and weight [outputs, inputs], both row-major and of this type. */
  readonly type: 'float16' | 'bfloat16';
  readonly x: DevicePointer;
  readonly weight: DevicePointer;
  readonly rows: number;
  readonly inputs: number;
  readonly outputs: number;
  /** [rows, outputs]. */
  readonly out: DevicePointer;
  readonly outType: 'float16' | 'bfloat16' | 'float32';
  /** Add to the contents of `out`. */
  readonly accumulate: boolean;
}

/** The library and its version, `13.1`, without a handle: for pd-doctor. */
export function inspectCublas(): { readonly library: NativeLibrary; readonly version: string } {
  const library = loadLibrary('cublas', Math.trunc(loadLibcuda().driverVersion() / 1000));
  const { cublasGetProperty } = bind(library, CUBLAS);
  const parts = [MAJOR_VERSION, MINOR_VERSION].map((property) => {
    const value = new Int32Array(1);
    const status = cublasGetProperty(property, value);
    return status === 0 ? value[0] : '?';
  });
  return { library, version: parts.join('.') };
}

export class Cublas {
  readonly library: NativeLibrary;
  readonly #call: Bound<typeof CUBLAS>;
  readonly #handle: CublasHandle;
  #disposed = false;

  private constructor(library: NativeLibrary) {
    this.library = library;
    this.#call = bind(library, CUBLAS);
    const out = new BigUint64Array(1);
    this.#check(this.#call.cublasCreate_v2(out), 'cublasCreate');
    this.#handle = out[0]! as CublasHandle;
  }

  /**
   * A handle on the current device, bound to `stream` and with its own workspace, which graph capture requires. Throws
   * LIBRARY_NOT_FOUND, LIBRARY_TOO_OLD or CUDA_ERROR.
   */
  static create(
    stream: CudaStreamHandle,
    workspace: { readonly pointer: DevicePointer; readonly bytes: number },
  ): Cublas {
    const major = Math.trunc(loadLibcuda().driverVersion() / 1000);
    const cublas = new Cublas(loadLibrary('cublas', major));
    const { cublasSetStream_v2, cublasSetWorkspace_v2, cublasSetMathMode } = cublas.#call;
    cublas.#check(cublasSetStream_v2(cublas.#handle, stream), 'cublasSetStream');
    // after cublasSetStream, which resets the workspace
    const { pointer, bytes } = workspace;
    cublas.#check(cublasSetWorkspace_v2(cublas.#handle, pointer, bytes), 'cublasSetWorkspace');
    cublas.#check(
      cublasSetMathMode(cublas.#handle, DISALLOW_REDUCED_PRECISION_REDUCTION),
      'cublasSetMathMode',
    );
    return cublas;
  }

  /** out = x weight^T. cuBLAS is column-major, where row-major matrices are transposed, so the operands are swapped. */
  product({ type, x, weight, rows, inputs, outputs, out, outType, accumulate }: RowProduct): void {
    const status = this.#call.cublasGemmEx(
      this.#handle,
      OP_T,
      OP_N,
      outputs,
      rows,
      inputs,
      ONE,
      weight,
      TYPES[type],
      inputs,
      x,
      TYPES[type],
      inputs,
      accumulate ? ONE : ZERO,
      out,
      TYPES[outType],
      outputs,
      COMPUTE_32F,
      DEFAULT_ALGORITHM,
    );
    if (status !== 0)
      this.#check(status, 'cublasGemmEx', `product of [${rows}, ${inputs}] and [${outputs}, ${inputs}]`);
  }

  /** Idempotent. Only after the stream has drained. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#check(this.#call.cublasDestroy_v2(this.#handle), 'cublasDestroy');
  }

  #check(status: number, call: string, what?: string): void {
    if (status === 0) return;
    const text = this.#call.cublasGetStatusString(status) ?? 'no text';
    // CUBLAS_STATUS_ALLOC_FAILED
    const code = status === 3 ? 'OUT_OF_DEVICE_MEMORY' : 'CUDA_ERROR';
    throw statusError(code, call, status, text, what === undefined ? {} : { what });
  }
}
