/** One GPU as this thread uses it. Several threads may each have a CudaDevice for the same GPU: addresses and events are common to all. */
import { type Libcuda, loadLibcuda } from '../../../ffi/libcuda.ts';
import { type Cudart, loadCudart } from '../../../ffi/libcudart.ts';
import { allocateNative, freeNative, nativeView } from '../../../ffi/native.ts';
import type { NativePointer } from '../../../ffi/pointers.ts';
import { PdError } from '../../errors.ts';
import { type CopyPlan, checkPlan, planBlocks, type StridedCopy } from '../../kv/reblock.ts';
import type {
  Device,
  DevicePointer,
  LayerTensor,
  MemoryRef,
  PagedLayer,
  PinnedPointer,
  Stream,
} from '../device.ts';
import { hostView } from '../memory.ts';
import { checkLayerTensor } from '../paged-cache.ts';
import { ArgumentSlots, type KernelTarget, loadKernels } from './kernels.ts';
import {
  blocksPerLaunch,
  COPY_KERNELS,
  elementBytes,
  type LayerAddresses,
  launches,
  PARAMETER_BYTES,
  sameLayouts,
  tilesPerRun,
  writeParameters,
} from './paged-copy.ts';
import { allocatePinnedOnThread } from './pinned.ts';
import { type CudaContext, CudaStream, EventPool, hasDrained, released } from './stream.ts';

/** A thread block of the copy kernels. */
const BLOCK = { threads: 256 };
/** Thread blocks per multiprocessor: enough loads in flight to fill the memory bus, few enough to leave room beside NCCL. */
const BLOCKS_PER_MULTIPROCESSOR = 8;

interface PinnedBuffer {
  readonly pointer: PinnedPointer;
  readonly view: Uint8Array;
}

export class CudaDevice implements Device, CudaContext {
  readonly kind = 'cuda';
  readonly name: string;
  readonly index: number;
  readonly runtime: Cudart;
  readonly driver: Libcuda;
  readonly target: KernelTarget;
  readonly multiProcessors: number;
  /** Which image of the copy kernels is in use. */
  readonly kernelImage: string;
  readonly #copyKernels: ReturnType<typeof loadCopies>['kernels'];
  readonly #events: EventPool;
  readonly #streams = new Set<CudaStream>();
  readonly #allocations: DevicePointer[] = [];
  readonly #pinned: PinnedBuffer[] = [];
  readonly #parameters: NativePointer;
  readonly #parameterView: DataView;
  #allocatedBytes = 0;
  #disposed = false;
  #abandoned = false;

  private constructor(index: number, runtime: Cudart, driver: Libcuda) {
    this.index = index;
    this.name = `cuda:${index}`;
    this.runtime = runtime;
    this.driver = driver;
    this.enter();
    this.#events = new EventPool(this);
    // The first stream makes the primary context, without which the driver loads no module.
    new CudaStream(this, this.#events, () => {}).dispose();
    this.multiProcessors = runtime.attribute(index, 'multiProcessors');
    this.target = {
      driver,
      major: runtime.attribute(index, 'computeMajor'),
      minor: runtime.attribute(index, 'computeMinor'),
      slots: new ArgumentSlots(),
    };
    const { image, kernels } = loadCopies(this.target);
    this.kernelImage = image;
    this.#copyKernels = kernels;
    this.#parameters = allocateNative(PARAMETER_BYTES);
    const view = nativeView(this.#parameters, PARAMETER_BYTES);
    this.#parameterView = new DataView(view.buffer, view.byteOffset, view.byteLength);
  }

  /** Loads libraries and kernels, which takes about a second. Throws LIBRARY_NOT_FOUND, LIBRARY_TOO_OLD, DEVICE_UNAVAILABLE or CUDA_ERROR. */
  static create(index: number): CudaDevice {
    const runtime = loadCudart();
    const count = runtime.deviceCount();
    if (index >= count) {
      throw new PdError(
        'DEVICE_UNAVAILABLE',
        `cuda:${index} is not there: this process sees ${count} ${count === 1 ? 'GPU' : 'GPUs'}${visible()}`,
        { device: index, count },
      );
    }
    return new CudaDevice(index, runtime, loadLibcuda());
  }

  enter(): void {
    this.runtime.setDevice(this.index);
  }

  /** What `allocate` has taken. */
  get allocatedBytes(): number {
    return this.#allocatedBytes;
  }

  allocate(bytes: number, what: string): MemoryRef & { readonly kind: 'cuda' } {
    this.#open(what);
    this.enter();
    let pointer: DevicePointer;
    try {
      pointer = this.runtime.malloc(bytes, what);
    } catch (error) {
      throw this.noMemory(error, bytes, what);
    }
    this.#allocations.push(pointer);
    this.#allocatedBytes += bytes;
    return { kind: 'cuda', device: this.index, pointer, bytes };
  }

  async allocatePinned(bytes: number, what: string): Promise<MemoryRef & { readonly kind: 'pinned' }> {
    this.#open(what);
    const keep = (pointer: PinnedPointer) => {
      this.#pinned.push({ pointer, view: nativeView(pointer, bytes) });
    };
    const pointer = await allocatePinnedOnThread({ device: this.index, bytes, what }, keep);
    keep(pointer);
    return { kind: 'pinned', pointer, bytes };
  }

  /** `urgent`: its launches start before those that wait in other streams. */
  createStream({ urgent = false }: { readonly urgent?: boolean } = {}): CudaStream {
    const stream = new CudaStream(this, this.#events, (gone) => this.#streams.delete(gone), urgent);
    this.#streams.add(stream);
    return stream;
  }

  /**
   * Memory of kind `host` is pageable: a copy from or to it waits, in this call, for all work before it in the stream. Only for
   * streams on which nothing waits for a peer.
   */
  copy(target: MemoryRef, source: MemoryRef, stream: Stream): void {
    if (target.bytes !== source.bytes) {
      throw new PdError('INTERNAL', `copy of ${source.bytes} bytes into ${target.bytes}`);
    }
    if (target.bytes === 0) return;
    this.enter();
    this.runtime.memcpyAsync(addressOf(target), addressOf(source), target.bytes, cudaStream(stream).handle);
  }

  gather(target: MemoryRef, layer: PagedLayer, blockIds: Int32Array, stream: Stream): void {
    this.gatherLayers([{ layer, tensor: target }], blockIds, stream);
  }

  scatter(layer: PagedLayer, blockIds: Int32Array, source: MemoryRef, stream: Stream, skip = 0): void {
    this.scatterLayers([{ layer, tensor: source }], blockIds, stream, skip);
  }

  gatherLayers(parts: readonly LayerTensor[], blockIds: Int32Array, stream: Stream): void {
    this.#layerCopies('gather', parts, blockIds, stream, 0);
  }

  scatterLayers(parts: readonly LayerTensor[], blockIds: Int32Array, stream: Stream, skip = 0): void {
    this.#layerCopies('scatter', parts, blockIds, stream, skip);
  }

  reblock(
    direction: 'gather' | 'scatter',
    cache: MemoryRef,
    tensor: MemoryRef,
    plan: CopyPlan,
    stream: Stream,
  ): void {
    checkPlan(plan, cache.bytes, tensor.bytes);
    this.enter();
    const addresses = [{ cache: kernelAddress(cache, direction), flat: kernelAddress(tensor, direction) }];
    for (const part of plan) this.#launchCopies(direction, part, addresses, stream);
  }

  view(memory: MemoryRef): Uint8Array {
    switch (memory.kind) {
      case 'host':
        return hostView(memory);
      case 'cuda':
        throw new PdError('INTERNAL', `memory of ${this.name} cannot be read by the CPU`);
      case 'pinned': {
        for (const { pointer, view } of this.#pinned) {
          const offset = Number(memory.pointer - pointer);
          if (offset >= 0 && offset + memory.bytes <= view.byteLength) {
            return view.subarray(offset, offset + memory.bytes);
          }
        }
        // taken by another thread of this process
        return nativeView(memory.pointer, memory.bytes);
      }
    }
  }

  /** `dispose` will free nothing: something on this GPU may never end, and freeing would wait for it. */
  abandonMemory(): void {
    this.#abandoned = true;
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    released(() => this.enter());
    // Freeing waits for the whole device: forever, if one of our streams is stuck. The end of the process frees everything.
    if (this.#abandoned || ![...this.#streams].every(hasDrained)) return;
    for (const stream of [...this.#streams]) stream.dispose();
    this.#events.dispose();
    for (const pointer of this.#allocations.splice(0)) released(() => this.runtime.free(pointer));
    for (const { pointer } of this.#pinned.splice(0)) released(() => this.runtime.freeHost(pointer));
    this.target.slots.dispose();
    freeNative(this.#parameters);
  }

  #layerCopies(
    direction: 'gather' | 'scatter',
    parts: readonly LayerTensor[],
    blockIds: Int32Array,
    stream: Stream,
    skip: number,
  ): void {
    // All are checked before the first is launched: a wrong size or id would let the kernel write anywhere in the GPU.
    for (const part of parts) checkLayerTensor(direction, part, blockIds.length);
    const groups = sameLayouts(parts).map((group) => ({
      plan: planBlocks(group[0]!.layer.layout, blockIds, skip),
      layers: group.map(({ layer, tensor }) => ({
        cache: kernelAddress(layer.memory, direction),
        flat: kernelAddress(tensor, direction),
      })),
    }));
    this.enter();
    for (const { plan, layers } of groups) {
      for (const part of plan) this.#launchCopies(direction, part, layers, stream);
    }
  }

  /** For each of `layers` the same copy. */
  #launchCopies(
    direction: 'gather' | 'scatter',
    { ids: all, flatOffset, ...shape }: StridedCopy,
    layers: readonly LayerAddresses[],
    stream: Stream,
  ): void {
    const { handle } = cudaStream(stream);
    const placed = layers.map(({ cache, flat }) => ({ cache, flat: flat + BigInt(flatOffset) }));
    for (const group of launches(placed, ({ cache, flat }) => elementBytes(shape, cache, flat))) {
      const { element } = group;
      const most = blocksPerLaunch(group.layers.length, shape, element);
      const kernel = this.#copyKernels[`${direction}_${element}`];
      for (let first = 0; first < all.length; first += most) {
        const ids = all.subarray(first, first + most);
        const offset = BigInt(first * shape.flatBlock);
        const at = group.layers.map(({ cache, flat }) => ({ cache, flat: flat + offset }));
        writeParameters(this.#parameterView, shape, at, ids, element);
        const tiles = at.length * ids.length * shape.runs * tilesPerRun(shape, element);
        const blocks = Math.min(tiles, this.multiProcessors * BLOCKS_PER_MULTIPROCESSOR);
        kernel.launch(handle, blocks, { p: this.#parameters });
      }
    }
  }

  #open(what: string): void {
    if (this.#disposed)
      throw new PdError('DEVICE_UNAVAILABLE', `${what}: device ${this.name} has been disposed`);
  }

  /** Why memory could not be allocated, and how much there was, which one must know to choose another size. */
  noMemory(error: unknown, bytes: number, what: string): PdError {
    const failed = PdError.from(error, 'CUDA_ERROR');
    if (failed.code !== 'OUT_OF_DEVICE_MEMORY') return failed;
    const { free, total } = this.runtime.memoryInfo();
    const message = `${what}: ${bytes} bytes are wanted on ${this.name}, which has ${free} of ${total} free`;
    return new PdError(failed.code, message, { ...failed.context, bytes, free, total }, { cause: error });
  }
}

function loadCopies(target: KernelTarget) {
  const { image, kernel } = loadKernels(COPY_KERNELS, target);
  const kernels = {
    gather_16: kernel('gather_16', {}, BLOCK),
    gather_1: kernel('gather_1', {}, BLOCK),
    scatter_16: kernel('scatter_16', {}, BLOCK),
    scatter_1: kernel('scatter_1', {}, BLOCK),
  };
  return { image, kernels };
}

/** For copies, which take pageable memory too. */
function addressOf(memory: MemoryRef): DevicePointer | PinnedPointer | Uint8Array {
  return memory.kind === 'host' ? hostView(memory) : memory.pointer;
}

/** An address that a kernel reaches. */
function kernelAddress(memory: MemoryRef, what: string): bigint {
  if (memory.kind !== 'host') return memory.pointer;
  throw new PdError('INTERNAL', `${what}: a GPU does not reach pageable host memory`);
}

/** For messages: which GPUs this process is allowed to see. */
function visible(): string {
  const chosen = process.env['CUDA_VISIBLE_DEVICES'];
  return chosen === undefined ? '' : ` (CUDA_VISIBLE_DEVICES=${chosen})`;
}

/** Throws INTERNAL for a stream of another device kind. */
function cudaStream(stream: Stream): CudaStream {
  if (stream instanceof CudaStream) return stream;
  throw new PdError('INTERNAL', 'a stream of another kind of device was given to a CUDA device');
}
