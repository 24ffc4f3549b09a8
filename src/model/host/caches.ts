/** The host's view of the paged KV cache: the device's own memory where the CPU can read it, a mirror of it where it cannot. */
import type { Device } from '../../device/device.ts';
import { hostView } from '../../device/memory.ts';
import type { NamedLayer } from '../../device/paged-cache.ts';
import type { ForwardBatch } from '../../scheduler/types.ts';
import { MirroredCaches } from './cache-mirror.ts';
import { asFloats, copyBlocks, type HostLayerCache } from './layer-cache.ts';

export interface HostCaches {
  readonly layers: readonly HostLayerCache[];
  /** Makes the step's block copies, and whatever the step reads readable. */
  prepare(batch: ForwardBatch): Promise<void> | void;
  /** The step's KV of `layer` has been written here; once this settles it is in the device's cache. */
  written(layer: number, batch: ForwardBatch): Promise<void> | void;
  dispose(): void;
}

export async function openHostCaches(device: Device, layers: readonly NamedLayer[]): Promise<HostCaches> {
  return device.kind === 'host' ? new InPlaceCaches(layers) : MirroredCaches.create(device, layers);
}

/** On the host device: no second copy. */
class InPlaceCaches implements HostCaches {
  readonly layers: readonly HostLayerCache[];

  constructor(layers: readonly NamedLayer[]) {
    this.layers = layers.map(({ cache }) => ({
      values: asFloats(hostView(cache.memory)),
      layout: cache.layout,
    }));
  }

  prepare(batch: ForwardBatch): void {
    copyBlocks(this.layers, batch);
  }

  written(): void {}

  dispose(): void {}
}
