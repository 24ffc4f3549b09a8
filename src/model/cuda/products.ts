/** Which program computes a matrix product: kernels of ours where few rows make it a matter of memory, cuBLAS for the rest. */
import type { Cublas } from '../../../ffi/libcublas.ts';
import type { DevicePointer } from '../../device/device.ts';
import { GEMV_ROWS, type Matrix, type ModelKernels, type ProductMode } from './kernels.ts';

export class Products {
  readonly #kernels: ModelKernels;
  /** Absent: every product by the kernel whose sums do not hang on the number of rows. */
  readonly #cublas: Cublas | undefined;

  constructor(kernels: ModelKernels, cublas: Cublas | undefined) {
    this.#kernels = kernels;
    this.#cublas = cublas;
  }

  /** out = x weight^T, as `mode` says. */
  product(mode: ProductMode, out: DevicePointer, x: DevicePointer, weight: Matrix, rows: number): void {
    if (!this.#cublas) {
      this.#kernels.gemm(mode, out, x, weight, rows);
      return;
    }
    if (rows <= GEMV_ROWS) {
      this.#kernels.gemv(mode, out, x, weight, rows);
      return;
    }
    const { type } = this.#kernels.shape;
    const { pointer, outputs, inputs } = weight;
    this.#cublas.product({
      type,
      x,
      weight: pointer,
      rows,
      inputs,
      outputs,
      out,
      outType: mode === 'store' ? type : 'float32',
      accumulate: mode === 'add',
    });
  }

  /** out [rows, intermediate] = silu(x gate^T) * (x up^T); `scratch` holds [rows, 2 * intermediate]. */
  gated(out: DevicePointer, x: DevicePointer, gateUp: Matrix, rows: number, scratch: DevicePointer): void {
    if (this.#cublas && rows <= GEMV_ROWS) {
      this.#kernels.gemv('swiglu', out, x, gateUp, rows);
      return;
    }
    this.product('store', scratch, x, gateUp, rows);
    this.#kernels.swiglu(out, scratch, rows, gateUp.outputs / 2);
  }
}
