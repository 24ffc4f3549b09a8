/**
 * Gather and scatter as kernel launches: the arithmetic, and the parameter block of kernels/gather_scatter.cu. Pure.
 *
 *   cache   |..|B7|..|B2|..      block b at b * cacheBlock, its second run (V) cacheRun further
 *   flat    |B7|B2|              block i at i * flatBlock, its second run flatRun further
 */
import type { PagedLayout } from '../../kv/layout.ts';
import type { StridedCopy } from '../../kv/reblock.ts';
import type { LayerTensor } from '../device.ts';

/** kernels/gather_scatter.cu. */
export const COPY_KERNELS = {
  source: 'gather_scatter',
  kernels: {
    gather_16: 'const __grid_constant__ PagedCopy p',
    gather_1: 'const __grid_constant__ PagedCopy p',
    scatter_16: 'const __grid_constant__ PagedCopy p',
    scatter_1: 'const __grid_constant__ PagedCopy p',
  },
} as const;

/** sizeof(PagedCopy): 40 bytes of strides, 16 of counts, and the table. */
export const PARAMETER_BYTES = 3_912;
const TABLE_OFFSET = 56;
const TABLE_BYTES = PARAMETER_BYTES - TABLE_OFFSET;
/** Two addresses of 8 bytes. */
const LAYER_BYTES = 16;
const ID_BYTES = 4;
/** Layers of one launch, which leave room for 708 ids. */
const MAX_LAYERS_PER_LAUNCH = 64;
/** The kernel counts tiles in 32 bits. */
const MAX_TILES = 2 ** 31;
/** Elements of one tile: 256 threads, 4 loads each. */
const TILE = 1_024;

/** How one layer's blocks and the dense tensor lie, in bytes. */
export type CopyShape = Omit<StridedCopy, 'ids' | 'flatOffset'>;

/** Element that a launch moves: 16 bytes where both bases and all strides allow it. */
export function elementBytes(shape: CopyShape, cache: bigint, flat: bigint): 16 | 1 {
  const strides = [shape.cacheBlock, shape.cacheRun, shape.flatBlock, shape.flatRun, shape.runBytes];
  return cache % 16n === 0n && flat % 16n === 0n && strides.every((stride) => stride % 16 === 0) ? 16 : 1;
}

/** Tiles of one run. */
export function tilesPerRun(shape: CopyShape, element: 16 | 1): number {
  return Math.ceil(shape.runBytes / (TILE * element));
}

function sameLayout(a: PagedLayout, b: PagedLayout): boolean {
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

/** Addresses of one layer: its cache, and its tensor. */
export interface LayerAddresses {
  readonly cache: bigint;
  readonly flat: bigint;
}

/** Block ids that one launch of so many layers takes. */
export function blocksPerLaunch(layers: number, shape: CopyShape, element: 16 | 1): number {
  const fit = Math.floor((TABLE_BYTES - layers * LAYER_BYTES) / ID_BYTES);
  return Math.max(
    1,
    Math.min(fit, Math.floor(MAX_TILES / (layers * shape.runs * tilesPerRun(shape, element)))),
  );
}

/** Fills the kernel's parameter block. `flat` of each layer is the address of the first of these blocks in its tensor. */
export function writeParameters(
  target: DataView,
  shape: CopyShape,
  layers: readonly LayerAddresses[],
  ids: Int32Array,
  element: 16 | 1,
): void {
  target.setBigUint64(0, BigInt(shape.cacheBlock), true);
  target.setBigUint64(8, BigInt(shape.cacheRun), true);
  target.setBigUint64(16, BigInt(shape.flatBlock), true);
  target.setBigUint64(24, BigInt(shape.flatRun), true);
  target.setBigUint64(32, BigInt(shape.runBytes), true);
  target.setUint32(40, layers.length, true);
  target.setUint32(44, ids.length, true);
  target.setUint32(48, shape.runs, true);
  target.setUint32(52, tilesPerRun(shape, element), true);
  let at = TABLE_OFFSET;
  for (const { cache, flat } of layers) {
    target.setBigUint64(at, cache, true);
    target.setBigUint64(at + 8, flat, true);
    at += LAYER_BYTES;
  }
  new Int32Array(target.buffer, target.byteOffset + at, ids.length).set(ids);
}

/** Runs of neighbours that one launch can do: at most so many, all copied by the same element. */
export function launches<A extends LayerAddresses>(
  layers: readonly A[],
  elementOf: (layer: A) => 16 | 1,
): { readonly layers: readonly A[]; readonly element: 16 | 1 }[] {
  const groups: { layers: A[]; element: 16 | 1 }[] = [];
  for (const layer of layers) {
    const element = elementOf(layer);
    const last = groups[groups.length - 1];
    if (last?.element === element && last.layers.length < MAX_LAYERS_PER_LAUNCH) last.layers.push(layer);
    else groups.push({ layers: [layer], element });
  }
  return groups;
}

/** Neighbours of one layout: what differs between them is where they lie. */
export function sameLayouts(parts: readonly LayerTensor[]): LayerTensor[][] {
  const groups: LayerTensor[][] = [];
  for (const part of parts) {
    const last = groups[groups.length - 1];
    if (last && sameLayout(last[0]!.layer.layout, part.layer.layout)) last.push(part);
    else groups.push([part]);
  }
  return groups;
}
