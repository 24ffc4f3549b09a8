/** Chooses what computes a matrix product: our own kernels for the few rows that are bound by memory, cuBLAS for the rest. */
import type { Cublas } from '../../../ffi/libcublas.ts';
import {
  type Addresses,
  GEMV_ROWS,
  type Matrix,
  type ModelKernels,
  type ProductArguments,
  type ProductMode,
} from './kernels.ts';

interface GatedArguments extends Addresses<'out' | 'x' | 'scratch'> {
  readonly gateUp: Matrix;
  readonly rows: number;
}

export class Products {
  readonly #kernels: ModelKernels;
  /** Absent: every product by the kernel whose sums do not depend on the number of rows. */
  readonly #cublas: Cublas | undefined;

  constructor(kernels: ModelKernels, cublas: Cublas | undefined) {
    this.#kernels = kernels;
    this.#cublas = cublas;
  }

  /** out = x weight^T, as `mode` says. */
  product(mode: ProductMode, args: ProductArguments): void {
    const { out, x, weight, rows } = args;
    if (!this.#cublas) {
      this.#kernels.gemm(mode, args);
      return;
    }
    if (rows <= GEMV_ROWS) {
      this.#kernels.gemv(mode, args);
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
  gated({ out, x, gateUp, rows, scratch }: GatedArguments): void {
    if (this.#cublas && rows <= GEMV_ROWS) {
      this.#kernels.gemv('swiglu', { out, x, weight: gateUp, rows });
      return;
    }
    this.product('store', { out: scratch, x, weight: gateUp, rows });
    this.#kernels.swiglu({ out, gateUp: scratch, rows, inner: gateUp.outputs / 2 });
  }
}
