/** The paged KV cache of a model, as both executors keep it: `kv-first`, one layer for each of the model's. */
import type { Device, MemoryRef, Stream } from '../device/device.ts';
import { sliceMemory } from '../device/memory.ts';
import {
  allocatePagedCache,
  attentionLayerName,
  type CacheAllocator,
  type NamedLayer,
} from '../device/paged-cache.ts';
import { type PagedLayout, runBytes, runOffset, runsPerBlock } from '../kv/layout.ts';
import type { Dtype } from '../wire/dtype.ts';
import type { ModelConfig } from './config.ts';

export interface KvFormat {
  readonly dtype: Dtype;
  /** Tokens per block. */
  readonly blockSize: number;
}

/** One layer's. */
export function kvLayout(
  { kvHeads, headDim }: ModelConfig,
  { dtype, blockSize }: KvFormat,
  numBlocks = 1,
): PagedLayout {
  return { family: 'kv-first', numBlocks, blockSize, heads: kvHeads, headDim, dtype };
}

/** For as long as `allocate` says. Throws OUT_OF_DEVICE_MEMORY. */
export async function allocateKvCache(
  device: Device,
  config: ModelConfig,
  format: KvFormat,
  numBlocks: number,
  allocate: CacheAllocator = allocatePagedCache,
): Promise<readonly NamedLayer[]> {
  const names = Array.from({ length: config.layers }, (_, index) => attentionLayerName(index));
  return allocate(device, kvLayout(config, format, numBlocks), names);
}

/** A block of a layer's cache. */
interface BlockRef {
  readonly memory: MemoryRef;
  readonly block: number;
}

/** Enqueues the copy of a whole block to another, of the same cache or of one of the same layout. */
export function copyBlock(
  device: Device,
  stream: Stream,
  layout: PagedLayout,
  target: BlockRef,
  source: BlockRef,
): void {
  for (let run = 0; run < runsPerBlock(layout); run++) {
    const part = ({ memory, block }: BlockRef) =>
      sliceMemory(memory, runOffset(layout, layout.numBlocks, block, run), runBytes(layout));
    device.copy(part(target), part(source), stream);
  }
}
