/** The paged KV cache of a model: one PagedLayer per layer, all of one layout, in device memory. */

import { PdError } from '../errors.ts';
import { blockBytes, layerBytes, type PagedLayout } from '../kv/layout.ts';
import type { Device, LayerTensor, PagedLayer } from './device.ts';

export interface NamedLayer {
  /** Name on the wire: `model.layers.0.self_attn.attn`. */
  readonly name: string;
  readonly cache: PagedLayer;
}

/** The name vLLM gives layer `index` of a decoder: what the tensor id carries after `#`. */
export function attentionLayerName(index: number): string {
  return `model.layers.${index}.self_attn.attn`;
}

/** How a worker takes the memory of its cache. */
export type CacheAllocator = (
  device: Device,
  layout: PagedLayout,
  names: readonly string[],
) => Promise<readonly NamedLayer[]> | readonly NamedLayer[];

/** Allocates `names.length` layers, for the life of the device. Throws OUT_OF_DEVICE_MEMORY. */
export function allocatePagedCache(
  device: Device,
  layout: PagedLayout,
  names: readonly string[],
): readonly NamedLayer[] {
  return names.map((name) => ({
    name,
    cache: { memory: device.allocate(layerBytes(layout), `KV cache of ${name}`), layout },
  }));
}

/** Throws INTERNAL where the tensor is not one of `blocks` blocks, or the layer's memory is too small: a copy would go anywhere. */
export function checkLayerTensor(what: string, { layer, tensor }: LayerTensor, blocks: number): void {
  const { layout, memory } = layer;
  const wanted = blockBytes(layout) * blocks;
  if (tensor.bytes !== wanted) {
    throw new PdError(
      'INTERNAL',
      `${what}: ${blocks} blocks take ${wanted} bytes, the tensor has ${tensor.bytes}`,
    );
  }
  const cache = layerBytes(layout);
  if (memory.bytes < cache) {
    throw new PdError('INTERNAL', `${what}: the layer takes ${cache} bytes, its memory has ${memory.bytes}`);
  }
}
