/** Which bytes move between a paged cache and the dense tensor of some of its blocks. Pure arithmetic, shared by every device. */
import { PdError } from '../errors.ts';
import { blockBytes, type PagedLayout, runBytes } from './layout.ts';

/** One contiguous copy; offsets in bytes, into the cache of the layer and into the tensor. */
export type CopyRun = (cacheOffset: number, tensorOffset: number, bytes: number) => void;

/**
 * Calls `copy` for blocks `blockIds[skip..]` of a cache and blocks `skip..` of a tensor of `blockIds.length` blocks. Block ids that follow
 * one another lie together in the cache, so they become one copy. Throws INTERNAL for an id outside of the cache, before any copy.
 */
export function forEachCopyRun(layout: PagedLayout, blockIds: Int32Array, skip: number, copy: CopyRun): void {
  for (let i = skip; i < blockIds.length; i++) {
    const id = blockIds[i]!;
    if (id < 0 || id >= layout.numBlocks) {
      throw new PdError('INTERNAL', `block ${id} is outside of a KV cache of ${layout.numBlocks} blocks`);
    }
  }
  // kv-first keeps K of all blocks in one half and V in the other; the other families keep a block in one piece.
  const halves = layout.family === 'kv-first' ? 2 : 1;
  const unit = halves === 2 ? runBytes(layout) : blockBytes(layout);
  let first = skip;
  while (first < blockIds.length) {
    let end = first + 1;
    while (end < blockIds.length && blockIds[end] === blockIds[end - 1]! + 1) end++;
    for (let half = 0; half < halves; half++) {
      const inCache = (half * layout.numBlocks + blockIds[first]!) * unit;
      const inTensor = (half * blockIds.length + first) * unit;
      copy(inCache, inTensor, (end - first) * unit);
    }
    first = end;
  }
}
