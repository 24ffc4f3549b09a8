/**
 * Gather and scatter as kernel launches: the arithmetic, and the parameter block of kernels/gather_scatter.cu. Pure.
 *
 *   cache   |..|B7|..|B2|..      block b at b * cacheBlock, its second run (V) cacheRun further
 *   flat    |B7|B2|              block i at i * flatBlock, its second run flatRun further
 */
import { PdError } from '../../errors.ts';
import {
  blockBytes,
  layerBytes,
  type PagedLayout,
  runBytes,
  runOffset,
  runsPerBlock,
} from '../../kv/layout.ts';

/** sizeof(PagedCopy): 56 bytes of pointers and strides, 12 of counts, the ids, padded to 8. */
export const PARAMETER_BYTES = 3_912;
/** Block ids in one launch. */
export const MAX_BLOCKS_PER_LAUNCH = 960;
/** Elements of one tile: 256 threads, 4 loads each. */
const TILE = 1_024;
const IDS_OFFSET = 68;

/** How one layer's blocks and the dense tensor lie, in bytes. */
export interface CopyShape {
  readonly cacheBlock: number;
  readonly cacheRun: number;
  readonly flatBlock: number;
  readonly flatRun: number;
  readonly runBytes: number;
  readonly runs: 1 | 2;
}

/** `blocks`: blocks of the whole dense tensor. */
export function copyShape(layout: PagedLayout, blocks: number): CopyShape {
  const both = runsPerBlock(layout) === 2;
  if (!both || layout.family === 'blocks-first') {
    // K and V of a block lie side by side in cache and tensor: one run
    const bytes = blockBytes(layout);
    return { cacheBlock: bytes, cacheRun: 0, flatBlock: bytes, flatRun: 0, runBytes: bytes, runs: 1 };
  }
  const bytes = runBytes(layout);
  return {
    cacheBlock: bytes,
    cacheRun: runOffset(layout, layout.numBlocks, 0, 1),
    flatBlock: bytes,
    flatRun: runOffset(layout, blocks, 0, 1),
    runBytes: bytes,
    runs: 2,
  };
}

/** Element that a launch moves: 16 bytes where both bases and all strides allow it. */
export function elementBytes(shape: CopyShape, cache: bigint, flat: bigint): 16 | 1 {
  const strides = [shape.cacheBlock, shape.cacheRun, shape.flatBlock, shape.flatRun, shape.runBytes];
  return cache % 16n === 0n && flat % 16n === 0n && strides.every((stride) => stride % 16 === 0) ? 16 : 1;
}

/** Tiles of one run. */
export function tilesPerRun(shape: CopyShape, element: 16 | 1): number {
  return Math.ceil(shape.runBytes / (TILE * element));
}

export function sameLayout(a: PagedLayout, b: PagedLayout): boolean {
  return (
    a === b ||
    (a.family === b.family &&
      a.numBlocks === b.numBlocks &&
      a.blockSize === b.blockSize &&
      a.heads === b.heads &&
      a.headDim === b.headDim &&
      a.dtype === b.dtype)
  );
}

/** The same blocks of another layer: what `writeParameters` has written stays, but for the two addresses. */
export function writeAddresses(target: DataView, cache: bigint, flat: bigint): void {
  target.setBigUint64(0, cache, true);
  target.setBigUint64(8, flat, true);
}

/** Fills the kernel's parameter block. `flat` is the address of the first of these blocks in the tensor. */
export function writeParameters(
  target: DataView,
  shape: CopyShape,
  cache: bigint,
  flat: bigint,
  ids: Int32Array,
  element: 16 | 1,
): void {
  writeAddresses(target, cache, flat);
  target.setBigUint64(16, BigInt(shape.cacheBlock), true);
  target.setBigUint64(24, BigInt(shape.cacheRun), true);
  target.setBigUint64(32, BigInt(shape.flatBlock), true);
  target.setBigUint64(40, BigInt(shape.flatRun), true);
  target.setBigUint64(48, BigInt(shape.runBytes), true);
  target.setUint32(56, ids.length, true);
  target.setUint32(60, shape.runs, true);
  target.setUint32(64, tilesPerRun(shape, element), true);
  for (let index = 0; index < ids.length; index++) target.setInt32(IDS_OFFSET + 4 * index, ids[index]!, true);
}

/** A wrong size or id would let the kernel write anywhere in the GPU, so this is checked on every call. Throws INTERNAL. */
export function checkCopy(
  what: 'gather' | 'scatter',
  layout: PagedLayout,
  cacheBytes: number,
  flatBytes: number,
  blockIds: Int32Array,
): void {
  const wanted = blockBytes(layout) * blockIds.length;
  if (flatBytes !== wanted) {
    throw new PdError(
      'INTERNAL',
      `${what}: ${blockIds.length} blocks take ${wanted} bytes, the tensor has ${flatBytes}`,
    );
  }
  if (cacheBytes < layerBytes(layout)) {
    throw new PdError(
      'INTERNAL',
      `${what}: the layer takes ${layerBytes(layout)} bytes, its memory has ${cacheBytes}`,
    );
  }
  for (const id of blockIds) {
    if (id < 0 || id >= layout.numBlocks) {
      throw new PdError(
        'INTERNAL',
        `${what}: block ${id} is outside of the cache of ${layout.numBlocks} blocks`,
      );
    }
  }
}
