/** Copies of whole KV blocks within each layer's cache, before a step reads or writes them. */
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { CudaStream } from '../../device/cuda/stream.ts';
import { sliceMemory } from '../../device/memory.ts';
import { runBytes, runOffset, runsPerBlock } from '../../kv/layout.ts';
import type { NamedLayer } from '../../kv/paged-cache.ts';
import type { ForwardBatch } from '../../scheduler/types.ts';

export function copyCacheBlocks(
  device: CudaDevice,
  stream: CudaStream,
  layers: readonly NamedLayer[],
  copies: ForwardBatch['blockCopies'],
): void {
  for (const { source, target } of copies) {
    for (const { cache } of layers) {
      const { layout, memory } = cache;
      const bytes = runBytes(layout);
      const run = (block: number, index: number) =>
        sliceMemory(memory, runOffset(layout, layout.numBlocks, block, index), bytes);
      for (let i = 0; i < runsPerBlock(layout); i++) {
        device.copy(run(target, i), run(source, i), stream);
      }
    }
  }
}
