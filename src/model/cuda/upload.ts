/** Weights from a checkpoint's files into GPU memory, through page-locked buffers: several reads and copies are under way at a time. */
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { CudaStream } from '../../device/cuda/stream.ts';
import type { MemoryRef } from '../../device/device.ts';
import { sliceMemory } from '../../device/memory.ts';
import { EventPoller } from '../../device/poller.ts';
import { PdError } from '../../errors.ts';
import { DTYPE_BYTES } from '../../wire/dtype.ts';
import { type FloatType, float32ToBfloat16, float32ToFloat16, toFloat32 } from '../float-convert.ts';
import type { Checkpoint } from '../safetensors.ts';
import type { Tensor } from '../tensors.ts';
import type { ElementType } from './kernels.ts';

/** Bytes of one buffer, and their number: Node reads files on four threads, and copies go on meanwhile. */
const PIECE = 8 * 2 ** 20;
const BUFFERS = 6;
/** For one piece, milliseconds: far more than it takes. */
const COPY_TIMEOUT = 60_000;

interface Buffer {
  readonly memory: MemoryRef;
  readonly view: Uint8Array;
}

/** The caller disposes it after `finish`, or after a failure. */
export class WeightUpload {
  readonly #checkpoint: Checkpoint;
  readonly #device: CudaDevice;
  readonly #stream: CudaStream;
  readonly #type: ElementType;
  readonly #progress: (bytes: number) => void;
  readonly #poller = new EventPoller();
  readonly #free: Buffer[];
  readonly #waiting: ((buffer: Buffer) => void)[] = [];
  readonly #pieces = new Set<Promise<void>>();
  #failure: PdError | undefined;

  private constructor(
    checkpoint: Checkpoint,
    device: CudaDevice,
    type: ElementType,
    buffers: Buffer[],
    progress: (bytes: number) => void,
  ) {
    this.#checkpoint = checkpoint;
    this.#device = device;
    this.#stream = device.createStream();
    this.#type = type;
    this.#free = buffers;
    this.#progress = progress;
  }

  /** `progress` is told the bytes of each piece that has arrived. */
  static async create(
    checkpoint: Checkpoint,
    device: CudaDevice,
    type: ElementType,
    progress: (bytes: number) => void,
  ): Promise<WeightUpload> {
    const pinned = await device.allocatePinned(PIECE * BUFFERS, 'buffers for loading weights');
    const buffers = Array.from({ length: BUFFERS }, (_, i) => {
      const memory = sliceMemory(pinned, i * PIECE, PIECE);
      return { memory, view: device.view(memory) };
    });
    return new WeightUpload(checkpoint, device, type, buffers, progress);
  }

  /**
   * Starts a tensor on its way to `target`, converted where the checkpoint stores another float type. Resolves when the last piece has
   * a buffer, not when it has arrived: that is `finish`. Throws CHECKPOINT_INVALID.
   */
  async put(target: MemoryRef, tensor: Tensor): Promise<void> {
    const { type, bytes } = this.#checkpoint.stored(tensor);
    const count = bytes / DTYPE_BYTES[type];
    if (target.bytes !== 2 * count) {
      throw new PdError('INTERNAL', `${count} elements of ${tensor.name} into ${target.bytes} bytes`);
    }
    const step = PIECE / 2;
    for (let first = 0; first < count; first += step) {
      const length = Math.min(step, count - first);
      const buffer = await this.#take();
      const to = sliceMemory(target, 2 * first, 2 * length);
      const piece = this.#move(buffer, to, tensor, type, first, length)
        .catch((error: unknown) => {
          this.#failure ??= PdError.from(error);
        })
        .finally(() => {
          this.#pieces.delete(piece);
          this.#give(buffer);
        });
      this.#pieces.add(piece);
      if (this.#failure) throw this.#failure;
    }
  }

  /** Resolves when everything is on the GPU. */
  async finish(): Promise<void> {
    await Promise.all(this.#pieces);
    if (this.#failure) throw this.#failure;
  }

  /** Also after a failure: waits for what is under way, which still writes into the buffers. */
  async dispose(): Promise<void> {
    await Promise.all(this.#pieces);
    this.#poller.dispose();
    this.#stream.dispose();
  }

  async #move(
    buffer: Buffer,
    target: MemoryRef,
    tensor: Tensor,
    stored: FloatType,
    first: number,
    length: number,
  ): Promise<void> {
    const source = sliceMemory(buffer.memory, 0, 2 * length);
    const view = buffer.view.subarray(0, 2 * length);
    if (stored === this.#type) {
      await this.#checkpoint.readPiece(tensor, 2 * first, view);
    } else {
      const size = DTYPE_BYTES[stored];
      const raw = new Uint8Array(size * length);
      await this.#checkpoint.readPiece(tensor, size * first, raw);
      const convert = this.#type === 'float16' ? float32ToFloat16 : float32ToBfloat16;
      convert(toFloat32(raw, stored), new Uint16Array(view.buffer, view.byteOffset, length));
    }
    this.#device.copy(target, source, this.#stream);
    const what = `copying ${tensor.name} to ${this.#device.name}`;
    await this.#poller.drained(this.#stream, COPY_TIMEOUT, what);
    this.#progress(2 * length);
  }

  #take(): Promise<Buffer> {
    const buffer = this.#free.pop();
    return buffer ? Promise.resolve(buffer) : new Promise((resolve) => this.#waiting.push(resolve));
  }

  #give(buffer: Buffer): void {
    const next = this.#waiting.shift();
    if (next) next(buffer);
    else this.#free.push(buffer);
  }
}
