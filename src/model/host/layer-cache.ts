/** One layer of the paged KV cache as the host reads and writes it: tokens in slots, slots in blocks. */
import type { PagedLayout } from '../../kv/layout.ts';
import type { ForwardBatch } from '../../scheduler/types.ts';

/** One layer's cache as float32, `kv-first`: [2, blocks, block, kvHeads, headDim]. K is stored after RoPE. */
export interface HostLayerCache {
  readonly values: Float32Array;
  readonly layout: PagedLayout;
}

/** Index of the first element of V. */
export function valuesOffset(layout: PagedLayout): number {
  return layout.numBlocks * layout.blockSize * layout.heads * layout.headDim;
}

/** Stores row `row` of k and v, both [rows, kvHeads * headDim], in `slot`. */
export function writeKv(
  cache: HostLayerCache,
  slot: number,
  k: Float32Array,
  v: Float32Array,
  row: number,
): void {
  const width = cache.layout.heads * cache.layout.headDim;
  const at = slot * width;
  cache.values.set(k.subarray(row * width, (row + 1) * width), at);
  cache.values.set(v.subarray(row * width, (row + 1) * width), at + valuesOffset(cache.layout));
}

/** K and V of each copied block, in every layer. */
export function copyBlocks(layers: readonly HostLayerCache[], batch: ForwardBatch): void {
  for (const { source, target } of batch.blockCopies) {
    for (const { values, layout } of layers) {
      const run = layout.blockSize * layout.heads * layout.headDim;
      const half = layout.numBlocks * run;
      for (const base of [0, half])
        values.copyWithin(base + target * run, base + source * run, base + (source + 1) * run);
    }
  }
}
