/** Kernel launches with their arguments, written into one block of native memory that the driver reads before a launch returns. */
import type { Libcuda } from '../../../ffi/libcuda.ts';
import { allocateNative, freeNative, nativeView } from '../../../ffi/native.ts';
import type { CudaStreamHandle, CuFunctionHandle, NativePointer } from '../../../ffi/pointers.ts';

/** More than any kernel of ours takes. */
const MAX_ARGUMENTS = 24;
/** Of one argument: a pointer, or a smaller number at its beginning. */
const SLOT = 8;

/** `launcher.pointer(x).int(rows).launch(kernel, blocks, threads)`: arguments in the order of the kernel's parameters. */
export class Launcher {
  readonly #driver: Libcuda;
  readonly #stream: CudaStreamHandle;
  readonly #memory: NativePointer;
  readonly #view: DataView;
  readonly #addresses: BigUint64Array;
  #at = 0;

  constructor(driver: Libcuda, stream: CudaStreamHandle) {
    this.#driver = driver;
    this.#stream = stream;
    this.#memory = allocateNative(MAX_ARGUMENTS * SLOT);
    const bytes = nativeView(this.#memory, MAX_ARGUMENTS * SLOT);
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const first = this.#memory;
    this.#addresses = BigUint64Array.from({ length: MAX_ARGUMENTS }, (_, i) => first + BigInt(i * SLOT));
  }

  /** `undefined` is a null pointer. */
  pointer(value: bigint | undefined): this {
    this.#view.setBigUint64(this.#next(), value ?? 0n, true);
    return this;
  }

  int(value: number): this {
    this.#view.setInt32(this.#next(), value, true);
    return this;
  }

  float(value: number): this {
    this.#view.setFloat32(this.#next(), value, true);
    return this;
  }

  launch(kernel: CuFunctionHandle, blocks: number, threads: number, sharedBytes = 0): void {
    this.#at = 0;
    this.#driver.launch(kernel, { blocks, threads, sharedBytes }, this.#stream, this.#addresses);
  }

  dispose(): void {
    freeNative(this.#memory);
  }

  #next(): number {
    return SLOT * this.#at++;
  }
}
