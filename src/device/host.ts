/** The device for a machine without a GPU: memory shared between threads, work done when the call returns. */
import { PdError } from '../errors.ts';
import { type CopyPlan, checkPlan, forEachPlannedRun, planBlocks } from '../kv/reblock.ts';
import type { Device, DeviceEvent, EventRef, LayerTensor, MemoryRef, PagedLayer, Stream } from './device.ts';
import { hostMemory, hostView } from './memory.ts';
import { checkLayerTensor } from './paged-cache.ts';

/** All earlier work is already done, so one event serves every point. */
const FIRED: DeviceEvent = {
  ref: { kind: 'host' },
  done: () => true,
  dispose: () => {},
};

const STREAM: Stream = {
  record: () => FIRED,
  wait(event: EventRef) {
    if (event.kind !== 'host')
      throw new PdError('INTERNAL', `a host stream cannot wait for a ${event.kind} event`);
  },
  dispose: () => {},
};

export class HostDevice implements Device {
  readonly kind = 'host';
  readonly name = 'host';
  #disposed = false;

  allocate(bytes: number, what: string): MemoryRef {
    if (this.#disposed) throw new PdError('DEVICE_UNAVAILABLE', `${what}: device host has been disposed`);
    try {
      return hostMemory(bytes);
    } catch (cause) {
      const failed = `${what}: ${bytes} bytes of host memory could not be allocated`;
      throw PdError.because('OUT_OF_DEVICE_MEMORY', failed, cause);
    }
  }

  async allocatePinned(bytes: number, what: string): Promise<MemoryRef> {
    return this.allocate(bytes, what);
  }

  createStream(): Stream {
    return STREAM;
  }

  copy(target: MemoryRef, source: MemoryRef, _stream: Stream): void {
    if (target.bytes !== source.bytes) {
      throw new PdError('INTERNAL', `copy of ${source.bytes} bytes into ${target.bytes}`);
    }
    hostView(target).set(hostView(source));
  }

  gather(tensor: MemoryRef, layer: PagedLayer, blockIds: Int32Array, stream: Stream): void {
    checkLayerTensor('gather', { layer, tensor }, blockIds.length);
    this.reblock('gather', layer.memory, tensor, planBlocks(layer.layout, blockIds), stream);
  }

  scatter(layer: PagedLayer, blockIds: Int32Array, tensor: MemoryRef, stream: Stream, skip = 0): void {
    checkLayerTensor('scatter', { layer, tensor }, blockIds.length);
    this.reblock('scatter', layer.memory, tensor, planBlocks(layer.layout, blockIds, skip), stream);
  }

  gatherLayers(parts: readonly LayerTensor[], blockIds: Int32Array, stream: Stream): void {
    for (const { layer, tensor } of parts) this.gather(tensor, layer, blockIds, stream);
  }

  scatterLayers(parts: readonly LayerTensor[], blockIds: Int32Array, stream: Stream, skip = 0): void {
    for (const { layer, tensor } of parts) this.scatter(layer, blockIds, tensor, stream, skip);
  }

  reblock(
    direction: 'gather' | 'scatter',
    cache: MemoryRef,
    tensor: MemoryRef,
    plan: CopyPlan,
    _stream: Stream,
  ): void {
    checkPlan(plan, cache.bytes, tensor.bytes);
    const [paged, dense] = [hostView(cache), hostView(tensor)];
    forEachPlannedRun(plan, (cacheOffset, tensorOffset, bytes) => {
      if (direction === 'gather') {
        dense.set(paged.subarray(cacheOffset, cacheOffset + bytes), tensorOffset);
      } else {
        paged.set(dense.subarray(tensorOffset, tensorOffset + bytes), cacheOffset);
      }
    });
  }

  view(memory: MemoryRef): Uint8Array {
    return hostView(memory);
  }

  /** The memory itself is garbage-collected. */
  dispose(): void {
    this.#disposed = true;
  }
}
