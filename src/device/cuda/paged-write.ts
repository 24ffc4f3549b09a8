/**
 * Writes from paged blocks to paged blocks as kernel launches: the arithmetic, and the parameter block of kernels/paged_write.cu. Pure.
 *
 *   source  |..|B7|..|B2|..      our cache: block b at b * blockStride, its second run (V) runStride further
 *   target  |B0|..|B9|..|..      the other process's, mapped here: the same with strides of its own
 */
import { PdError } from '../../errors.ts';

/** kernels/paged_write.cu. */
export const WRITE_KERNELS = {
  source: 'paged_write',
  kernels: {
    write_16: 'const __grid_constant__ PagedWrite p',
    write_1: 'const __grid_constant__ PagedWrite p',
  },
} as const;

/** sizeof(PagedWrite): 12 words, 6 counts, and the table. */
export const WRITE_PARAMETER_BYTES = 2_168;
const TABLE_OFFSET = 120;
/** Threads of a thread block. */
export const WRITE_THREADS = 512;
/** Elements of one unit, which one warp moves: 32 threads, 8 loads each. */
const UNIT = 256;
export const MAX_LAYERS_PER_WRITE = 128;
/** The kernel counts units in 32 bits. */
const MAX_UNITS = 2 ** 31;

/** How blocks lie in one layer of a cache, in bytes. Layouts, block sizes and element types all come down to this. */
export interface BlockStrides {
  readonly runBytes: number;
  /** K and V apart, or one run (MLA). */
  readonly runs: 1 | 2;
  readonly blockStride: number;
  /** From a block's first run to its second; 0 where there is one. */
  readonly runStride: number;
}

/** Where one layer lies in either cache. */
export interface WriteLayer {
  readonly source: bigint;
  readonly target: bigint;
}

/** One launch. Addresses are the device's. */
export interface PagedWrite {
  readonly source: BlockStrides;
  readonly target: BlockStrides;
  /** Of the launch's layers: part of what `writeTable` made. */
  readonly table: Uint8Array;
  /** `blocks` ids of 32 bits each, in the device's memory. */
  readonly sourceIds: bigint;
  readonly targetIds: bigint;
  readonly blocks: number;
  /** Blocks of either cache: ids from there on are refused. */
  readonly sourceBlocks: number;
  readonly targetBlocks: number;
  /** The grant word, and what it must name. */
  readonly grant: bigint;
  readonly seq: bigint;
  /** The slot's words for flag, begin, end and fault. */
  readonly marks: bigint;
  /** What the flag is set to in the end; 0 where this launch is not the last of its kind. */
  readonly flag: bigint;
  /** Four zeroed 32-bit counts of the device's memory, for launches of one stream. */
  readonly counter: bigint;
}

/** Element that a launch moves: 16 bytes where every address and stride allows it. */
export function writeElement(
  source: BlockStrides,
  target: BlockStrides,
  layers: readonly WriteLayer[],
): 16 | 1 {
  const strides = [
    source.blockStride,
    source.runStride,
    target.blockStride,
    target.runStride,
    source.runBytes,
  ];
  const aligned =
    strides.every((stride) => stride % 16 === 0) &&
    layers.every((layer) => layer.source % 16n === 0n && layer.target % 16n === 0n);
  return aligned ? 16 : 1;
}

/** Units of one run. */
export function unitsPerRun(runBytes: number, element: 16 | 1): number {
  return Math.ceil(runBytes / (UNIT * element));
}

/** Layers that one launch of so many blocks takes: at least 1. Throws LIMIT_EXCEEDED where not even one fits. */
export function layersPerWrite(blocks: number, { runs, runBytes }: BlockStrides, element: 16 | 1): number {
  const units = blocks * runs * unitsPerRun(runBytes, element);
  if (units >= MAX_UNITS)
    throw new PdError('LIMIT_EXCEEDED', `${blocks} blocks of ${runBytes} bytes are too many for one write`);
  return Math.min(MAX_LAYERS_PER_WRITE, Math.max(1, Math.floor((MAX_UNITS - 1) / Math.max(1, units))));
}

/** Bytes of one layer in a table. */
export const WRITE_LAYER_BYTES = 16;

/** Where layers lie, as the kernel reads it; made once, as launches are many. */
export function writeTable(layers: readonly WriteLayer[]): Uint8Array {
  const table = new BigUint64Array(layers.flatMap(({ source, target }) => [source, target]));
  return new Uint8Array(table.buffer);
}

/** Fills the kernel's parameter block. */
export function writeParameterBlock(view: DataView, write: PagedWrite, element: 16 | 1): void {
  const { source, target, table } = write;
  const layers = table.length / WRITE_LAYER_BYTES;
  if (layers > MAX_LAYERS_PER_WRITE) throw new PdError('INTERNAL', `${layers} layers in one write`);
  const words = [
    BigInt(source.blockStride),
    BigInt(source.runStride),
    BigInt(target.blockStride),
    BigInt(target.runStride),
    BigInt(source.runBytes),
    write.sourceIds,
    write.targetIds,
    write.grant,
    write.seq,
    write.marks,
    write.flag,
    write.counter,
  ];
  for (let i = 0; i < words.length; i++) view.setBigUint64(8 * i, words[i]!, true);
  const units = unitsPerRun(source.runBytes, element);
  const counts = [layers, write.blocks, source.runs, units, write.sourceBlocks, write.targetBlocks];
  for (let i = 0; i < counts.length; i++) view.setUint32(96 + 4 * i, counts[i]!, true);
  new Uint8Array(view.buffer, view.byteOffset + TABLE_OFFSET, table.length).set(table);
}
