/** Decode steps recorded once per batch size and launched as a whole: some 300 launches of a few microseconds each become one. */
import type { Cudart } from '../../../ffi/libcudart.ts';
import type { CudaGraphExecHandle, CudaStreamHandle } from '../../../ffi/pointers.ts';

/** Batch sizes with a graph of their own; others are padded to the next. One and two have kernels of their own (gemv). */
const SIZES = [1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256];

/** Sizes for at most `most` sequences, the last of them `most` itself where it is within the table. */
export function graphSizes(most: number): readonly number[] {
  const sizes = SIZES.filter((size) => size < most);
  const last = SIZES.find((size) => size >= most);
  return last === undefined ? sizes : [...sizes, most];
}

export class DecodeGraphs {
  readonly #runtime: Cudart;
  readonly #stream: CudaStreamHandle;
  readonly #bySize = new Map<number, CudaGraphExecHandle>();

  constructor(runtime: Cudart, stream: CudaStreamHandle) {
    this.#runtime = runtime;
    this.#stream = stream;
  }

  /** Records what `enqueue` enqueues as the step of `size` sequences. */
  capture(size: number, enqueue: () => void): void {
    this.#bySize.set(size, this.#runtime.graphCapture(this.#stream, enqueue));
  }

  /** The smallest recorded size for `sequences`, if any. */
  sizeFor(sequences: number): number | undefined {
    // sizes were captured in rising order
    for (const size of this.#bySize.keys()) if (size >= sequences) return size;
    return undefined;
  }

  launch(size: number): void {
    this.#runtime.graphLaunch(this.#bySize.get(size)!, this.#stream);
  }

  dispose(): void {
    for (const graph of this.#bySize.values()) this.#runtime.graphDestroy(graph);
    this.#bySize.clear();
  }
}
