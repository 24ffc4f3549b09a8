/** The device for a machine without a GPU: memory shared between threads, work done when the call returns. */
import { PdError } from '../errors.ts';
import { forEachCopyRun } from '../kv/copy-runs.ts';
import { blockBytes, layerBytes } from '../kv/layout.ts';
import { type CopyPlan, checkPlan, forEachPlannedRun } from '../kv/reblock.ts';
import type { Device, DeviceEvent, EventRef, LayerTensor, MemoryRef, PagedLayer, Stream } from './device.ts';
import { hostMemory, hostView } from './memory.ts';

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
      throw new PdError(
        'OUT_OF_DEVICE_MEMORY',
        `${what}: ${bytes} bytes of host memory could not be allocated: ${PdError.from(cause).message}`,
        {},
        { cause },
      );
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

  gather(target: MemoryRef, layer: PagedLayer, blockIds: Int32Array, _stream: Stream): void {
    checkSizes(target, layer, blockIds, 'gather');
    const tensor = hostView(target);
    const cache = hostView(layer.memory);
    forEachCopyRun(layer.layout, blockIds, 0, (cacheOffset, tensorOffset, bytes) => {
      tensor.set(cache.subarray(cacheOffset, cacheOffset + bytes), tensorOffset);
    });
  }

  scatter(layer: PagedLayer, blockIds: Int32Array, source: MemoryRef, _stream: Stream, skip = 0): void {
    checkSizes(source, layer, blockIds, 'scatter');
    const tensor = hostView(source);
    const cache = hostView(layer.memory);
    forEachCopyRun(layer.layout, blockIds, skip, (cacheOffset, tensorOffset, bytes) => {
      cache.set(tensor.subarray(tensorOffset, tensorOffset + bytes), cacheOffset);
    });
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

function checkSizes(tensor: MemoryRef, layer: PagedLayer, blockIds: Int32Array, what: string): void {
  const wanted = blockBytes(layer.layout) * blockIds.length;
  if (tensor.bytes !== wanted) {
    throw new PdError(
      'INTERNAL',
      `${what}: ${blockIds.length} blocks take ${wanted} bytes, the tensor has ${tensor.bytes}`,
    );
  }
  const cache = layerBytes(layer.layout);
  if (layer.memory.bytes < cache) {
    throw new PdError(
      'INTERNAL',
      `${what}: the layer takes ${cache} bytes, its memory has ${layer.memory.bytes}`,
    );
  }
}
