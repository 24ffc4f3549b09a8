/**
 * How the KV of one layer lies in a paged cache, and how the tensor on the wire looks. Pure arithmetic.
 *
 *   family         cache (N blocks)                          wire (n blocks of one request)
 *   kv-first       [2, N, block, heads, dim]                 [2, n, block, heads, dim]
 *   blocks-first   [N, 2, block, heads, dim]                 [n, 2, block, heads, dim]
 *   mla            [N, block, dim]                           [n, block, dim]
 */
import { DTYPE_BYTES, type Dtype } from '../wire/dtype.ts';

export type LayoutFamily = 'kv-first' | 'blocks-first' | 'mla';

export interface PagedLayout {
  readonly family: LayoutFamily;
  readonly numBlocks: number;
  /** Tokens per block. */
  readonly blockSize: number;
  /** KV heads; 1 for `mla`. */
  readonly heads: number;
  readonly headDim: number;
  readonly dtype: Dtype;
}

/** Bytes of one contiguous run: K or V of one block, or the whole block of `mla`. */
export function runBytes(layout: PagedLayout): number {
  return layout.blockSize * layout.heads * layout.headDim * DTYPE_BYTES[layout.dtype];
}

/** Runs that one block consists of. */
export function runsPerBlock(layout: PagedLayout): 1 | 2 {
  return layout.family === 'mla' ? 1 : 2;
}

/** Bytes of one block, K and V. */
export function blockBytes(layout: PagedLayout): number {
  return runBytes(layout) * runsPerBlock(layout);
}

/** Bytes of the whole cache of one layer. */
export function layerBytes(layout: PagedLayout): number {
  return blockBytes(layout) * layout.numBlocks;
}

/** Byte offset of run `run` (0 = K, 1 = V) of block `block` in a cache or tensor of `numBlocks` blocks. */
export function runOffset(layout: PagedLayout, numBlocks: number, block: number, run: number): number {
  const index = layout.family === 'blocks-first' ? block * 2 + run : run * numBlocks + block;
  return index * runBytes(layout);
}

/** KV bytes of one request on the wire: layers x K and V x tokens (blocks rounded up) x heads x dim x element size. */
export function requestKvBytes(layout: PagedLayout, layers: number, tokens: number): number {
  return layers * Math.ceil(tokens / layout.blockSize) * blockBytes(layout);
}

/** Cache slots of the tokens at positions `start` to `end` (exclusive): block * blockSize + offset. */
export function slotMapping(
  blockIds: readonly number[],
  blockSize: number,
  start: number,
  end: number,
): number[] {
  const slots: number[] = [];
  for (let position = start; position < end; position++) {
    slots.push(blockIds[Math.floor(position / blockSize)]! * blockSize + (position % blockSize));
  }
  return slots;
}
