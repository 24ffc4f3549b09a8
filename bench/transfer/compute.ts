/**
 * Work for a GPU during transfers: products on the tensor cores, compute-bound like prefill, and paged copies, memory-bound like decode.
 * Kernels are compiled when the peer starts, since a module loads only while no receive waits for its sender.
 */
import { allocateNative, nativeView } from '../../ffi/native.ts';
import { loadNvrtc } from '../../ffi/nvrtc.ts';
import type { CuFunctionHandle } from '../../ffi/pointers.ts';
import type { CudaDevice } from '../../src/device/cuda/device.ts';
import type { CudaStream } from '../../src/device/cuda/stream.ts';
import type { DeviceEvent, MemoryRef, PagedLayer } from '../../src/device/device.ts';
import type { EventPoller } from '../../src/device/poller.ts';
import { PdError } from '../../src/errors.ts';
import { blockBytes, layerBytes, type PagedLayout } from '../../src/kv/layout.ts';
import { monotonicMs } from '../measure/machine.ts';
import type { ComputeLoop } from './messages.ts';

/** Iterations enqueued ahead, so that the GPU never waits for this thread. */
const AHEAD = 4;
const ITERATION_TIMEOUT_MS = 30_000;
const THREADS = 256;
/** Thread blocks per multiprocessor: several rounds of them, as in a large matrix product. */
const WAVES = 8;
/** Rounds of the product loop in one iteration: about a millisecond. */
const PRODUCT_ROUNDS = 4_000;
/** Paged copies in one iteration. */
const COPIES = 2;

/** Each warp multiplies 16x16 by 16x8 matrices of bf16 in registers, four independent ones at a time. */
const SOURCE = `
extern "C" __global__ void __launch_bounds__(${THREADS}) products(float *out, unsigned rounds) {
  unsigned seed = (blockIdx.x * blockDim.x + threadIdx.x) * 2654435761u + 1u;
  unsigned a[4], b[2];
  for (int i = 0; i < 4; i++) { seed = seed * 1664525u + 1013904223u; a[i] = (seed & 0x007f007fu) | 0x3c003c00u; }
  for (int i = 0; i < 2; i++) { seed = seed * 1664525u + 1013904223u; b[i] = (seed & 0x807f807fu) | 0x3c003c00u; }
  float c[4][4] = {};
  for (unsigned round = 0; round < rounds; round++) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  float sum = 0;
  for (int i = 0; i < 4; i++) for (int j = 0; j < 4; j++) sum += c[i][j];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}`;

/** 256 MiB of blocks, which fit in no cache; on a small GPU, a 32nd of its memory. */
const LAYOUT: PagedLayout = {
  family: 'mla',
  numBlocks: 4_096,
  blockSize: 16,
  heads: 1,
  headDim: 2_048,
  dtype: 'bfloat16',
};

export class Compute {
  readonly #device: CudaDevice;
  readonly #poller: EventPoller;
  readonly #stream: CudaStream;
  readonly #layer: PagedLayer;
  readonly #tensor: MemoryRef;
  readonly #ids: Int32Array;
  /** The reason, if it could not be compiled. */
  readonly #products: CuFunctionHandle | PdError;
  readonly #arguments: DataView;
  readonly #argumentList: BigUint64Array;

  private constructor(device: CudaDevice, poller: EventPoller, layout: PagedLayout) {
    this.#device = device;
    this.#poller = poller;
    this.#stream = device.createStream();
    this.#layer = { memory: device.allocate(layerBytes(layout), 'the compute loop'), layout };
    this.#tensor = device.allocate(layerBytes(layout), 'the compute loop');
    this.#ids = Int32Array.from({ length: layout.numBlocks }, (_, i) => (i * 1_009) % layout.numBlocks);
    this.#products = compileProducts(device);
    const native = allocateNative(16);
    const view = nativeView(native, 16);
    this.#arguments = new DataView(view.buffer, view.byteOffset, view.byteLength);
    this.#arguments.setBigUint64(
      0,
      device.allocate(device.multiProcessors * WAVES * THREADS * 4, 'the compute loop').pointer,
      true,
    );
    this.#argumentList = BigUint64Array.of(native, native + 8n);
  }

  static create(device: CudaDevice, poller: EventPoller): Compute {
    device.enter();
    const fitting = Math.trunc(device.runtime.memoryInfo().total / 32 / blockBytes(LAYOUT));
    return new Compute(device, poller, { ...LAYOUT, numBlocks: Math.min(LAYOUT.numBlocks, fitting) });
  }

  /** What stands for the layers of a prefill: without the compiler, paged copies. */
  get prefillLoop(): ComputeLoop {
    return this.#products instanceof PdError ? 'memory' : 'matmul';
  }

  /** Enqueues one iteration, or several; the event fires when they have ended. Throws CUDA_ERROR if the loop's kernel could not be compiled. */
  one(loop: ComputeLoop, times = 1): DeviceEvent {
    for (let i = 0; i < times; i++) this.#iterate(loop);
    return this.#stream.record();
  }

  /** Iterations in about `ms`, and how long they really took. Throws CUDA_ERROR if the loop's kernel could not be compiled. */
  async run(loop: ComputeLoop, ms: number): Promise<{ readonly iterations: number; readonly ms: number }> {
    const inFlight: DeviceEvent[] = [];
    const enqueue = () => inFlight.push(this.one(loop));
    const take = async () => {
      const event = inFlight.shift();
      if (!event) return;
      await this.#poller.wait(event, ITERATION_TIMEOUT_MS, `the compute loop ${loop}`);
      event.dispose();
    };
    for (let i = 0; i < AHEAD; i++) enqueue();
    await take();
    const start = monotonicMs();
    let iterations = 0;
    while (monotonicMs() - start < ms) {
      enqueue();
      await take();
      iterations++;
    }
    const took = monotonicMs() - start;
    while (inFlight.length > 0) await take();
    return { iterations, ms: took };
  }

  /** One kernel that runs for about `ms`; without the compiler, a series of paged copies. Returns once they are enqueued. */
  async occupy(ms: number): Promise<void> {
    if (this.#products instanceof PdError) {
      const one = () => this.#iterate('memory');
      const each = await this.#timed(one);
      for (let i = 0; i < ms / each; i++) one();
      return;
    }
    const rounds = 200_000;
    const blocks = this.#device.multiProcessors;
    // the first launch may still load the kernel
    await this.#timed(() => this.#launch(rounds, blocks));
    const each = (await this.#timed(() => this.#launch(rounds, blocks))) / rounds;
    this.#launch(Math.min(Math.round(ms / each), 2 ** 32 - 1), blocks);
  }

  async #timed(enqueue: () => void): Promise<number> {
    const start = monotonicMs();
    enqueue();
    const event = this.#stream.record();
    await this.#poller.wait(event, ITERATION_TIMEOUT_MS, 'a long kernel');
    event.dispose();
    return monotonicMs() - start;
  }

  #iterate(loop: ComputeLoop): void {
    if (loop === 'memory') {
      for (let i = 0; i < COPIES; i++)
        this.#device.gather(this.#tensor, this.#layer, this.#ids, this.#stream);
      return;
    }
    this.#launch(PRODUCT_ROUNDS, this.#device.multiProcessors * WAVES);
  }

  #launch(rounds: number, blocks: number): void {
    if (this.#products instanceof PdError) throw this.#products;
    this.#device.enter();
    this.#arguments.setUint32(8, rounds, true);
    const shape = { blocks, threads: THREADS };
    this.#device.driver.launch(this.#products, shape, this.#stream.handle, this.#argumentList);
  }
}

function compileProducts({ driver, target }: CudaDevice): CuFunctionHandle | PdError {
  try {
    const nvrtc = loadNvrtc(Math.trunc(driver.driverVersion() / 1000));
    const options = [`--gpu-architecture=sm_${target.major}${target.minor}`, '--std=c++17'];
    const module = driver.moduleLoad(nvrtc.compile('products.cu', SOURCE, options), 'the compute loop');
    return driver.moduleFunction(module, 'products');
  } catch (error) {
    return PdError.from(error, 'CUDA_ERROR');
  }
}
