/**
 * Copying between a paged cache and a dense tensor of any family and block size. Pure arithmetic.
 *
 * Cut into units of tokens that are contiguous on both ends, the two differ only by strides, so a plan is one copy for all units that
 * lie at equal distances in the tensor, and one for the unit that the prompt ends in. A GPU runs each as one launch of the paged copy
 * kernel; the host as runs of bytes.
 *
 *   cache    blocks of 4   |..|B5: t0 t1 t2 t3|..|B2: t4 t5 t6 t7|
 *   tensor   blocks of 6   |t0 t1 t2 t3 t4 t5|t6 t7 . . . .|           units of 2: t0 t1, t2 t3, t4 t5, t6 t7
 */
import { PdError } from '../errors.ts';
import { DTYPE_BYTES } from '../wire/dtype.ts';
import { capacity, type WireForm } from './families.ts';
import { type PagedLayout, runsPerBlock } from './layout.ts';

/** One contiguous copy; offsets in bytes, into the cache of the layer and into the tensor. */
export type CopyRun = (cacheOffset: number, tensorOffset: number, bytes: number) => void;

/** Units at equal distances in the tensor, anywhere in the cache. All in bytes, but `ids`. */
export interface StridedCopy {
  /** Unit `i` lies at `ids[i] * cacheBlock` in the cache and at `flatOffset + i * flatBlock` in the tensor. */
  readonly ids: Int32Array;
  readonly cacheBlock: number;
  readonly flatOffset: number;
  readonly flatBlock: number;
  /** From a unit's first run (K) to its second (V), in the cache and in the tensor. */
  readonly cacheRun: number;
  readonly flatRun: number;
  readonly runBytes: number;
  readonly runs: 1 | 2;
}

export type CopyPlan = readonly StridedCopy[];

export interface CopySpan {
  /** Tokens of the prompt from position 0: what lies behind them is left alone. At most the capacity of both ends. */
  readonly tokens: number;
  /** Leading blocks of `blockIds` that are left alone too. */
  readonly skipBlocks?: number;
}

interface Geometry {
  readonly layout: PagedLayout;
  readonly form: WireForm;
  readonly blockIds: Int32Array;
  /** Tokens per unit. */
  readonly unit: number;
  /** Bytes of one token's K (or V). */
  readonly tokenBytes: number;
}

/** Throws INTERNAL where blocks, form and tokens do not go together. */
export function planCopy(
  layout: PagedLayout,
  blockIds: Int32Array,
  form: WireForm,
  { tokens, skipBlocks = 0 }: CopySpan,
): CopyPlan {
  checkSpan(layout, blockIds, form, tokens, skipBlocks);
  const { blockSize } = layout;
  const first = skipBlocks * blockSize;
  if (first >= tokens) return [];
  const tokenBytes = layout.heads * layout.headDim * DTYPE_BYTES[layout.dtype];
  const unit = form.family === 'blocks-first' ? gcd(blockSize, form.blockSize) : blockSize;
  const geometry = { layout, form, blockIds, unit, tokenBytes };
  const whole = Math.floor(tokens / unit);
  const plan: StridedCopy[] = [];
  // Units that follow one another in a block of the tensor are of different copies: only from block to block are distances equal.
  const copies = form.family === 'blocks-first' ? form.blockSize / unit : 1;
  for (let i = 0; i < copies && first / unit + i < whole; i++) {
    const units: number[] = [];
    for (let index = first / unit + i; index < whole; index += copies) units.push(index);
    plan.push(stridedCopy(geometry, units, unit));
  }
  const tail = tokens - whole * unit;
  if (tail > 0) plan.push(stridedCopy(geometry, [whole], tail));
  return plan;
}

/** The same for the dense tensor of `blockIds` in the cache's own family and block size, without its first `skipBlocks` blocks. */
export function planBlocks(layout: PagedLayout, blockIds: Int32Array, skipBlocks = 0): CopyPlan {
  const form = { family: layout.family, blocks: blockIds.length, blockSize: layout.blockSize };
  return planCopy(layout, blockIds, form, { tokens: capacity(form), skipBlocks });
}

function stridedCopy(geometry: Geometry, units: readonly number[], tokens: number): StridedCopy {
  const { layout, form, blockIds, unit, tokenBytes } = geometry;
  const { blockSize, family } = layout;
  const unitsPerBlock = blockSize / unit;
  const inBlocks = form.family === 'blocks-first';
  const start = units[0]! * unit;
  const flatOffset = inBlocks
    ? (Math.floor(start / form.blockSize) * 2 * form.blockSize + (start % form.blockSize)) * tokenBytes
    : start * tokenBytes;
  if (family === 'blocks-first' && inBlocks && form.blockSize === blockSize && tokens === blockSize) {
    // K and V of a block are neighbours on both ends
    const bytes = 2 * blockSize * tokenBytes;
    const ids = Int32Array.from(units, (index) => blockIds[index]!);
    return {
      ids,
      cacheBlock: bytes,
      flatOffset,
      flatBlock: bytes,
      cacheRun: 0,
      flatRun: 0,
      runBytes: bytes,
      runs: 1,
    };
  }
  const runs = runsPerBlock(layout);
  const cacheRuns = family === 'kv-first' ? layout.numBlocks * blockSize : blockSize;
  const flatRuns = inBlocks ? form.blockSize : capacity(form);
  // In a cache with blocks first, K and V of a block lie between the first unit of one block and of the next.
  const stride = family === 'blocks-first' ? 2 * unitsPerBlock : unitsPerBlock;
  const ids = Int32Array.from(
    units,
    (index) => blockIds[Math.floor(index / unitsPerBlock)]! * stride + (index % unitsPerBlock),
  );
  return {
    ids,
    cacheBlock: unit * tokenBytes,
    flatOffset,
    flatBlock: (inBlocks ? 2 * form.blockSize : unit) * tokenBytes,
    cacheRun: runs === 2 ? cacheRuns * tokenBytes : 0,
    flatRun: runs === 2 ? flatRuns * tokenBytes : 0,
    runBytes: tokens * tokenBytes,
    runs,
  };
}

/** Calls `copy` for each contiguous piece of the plan; neighbours on both ends are one piece. */
export function forEachPlannedRun(plan: CopyPlan, copy: CopyRun): void {
  for (const part of plan) {
    const { ids, cacheBlock, flatOffset, flatBlock, cacheRun, flatRun, runBytes, runs } = part;
    const dense = cacheBlock === runBytes && flatBlock === runBytes;
    for (let run = 0; run < runs; run++) {
      let first = 0;
      while (first < ids.length) {
        let end = first + 1;
        while (dense && end < ids.length && ids[end] === ids[end - 1]! + 1) end++;
        copy(
          ids[first]! * cacheBlock + run * cacheRun,
          flatOffset + first * flatBlock + run * flatRun,
          (end - first) * runBytes,
        );
        first = end;
      }
    }
  }
}

/** A wrong offset would write anywhere, so devices check every plan. Throws INTERNAL. */
export function checkPlan(plan: CopyPlan, cacheBytes: number, flatBytes: number): void {
  for (const { ids, cacheBlock, flatOffset, flatBlock, cacheRun, flatRun, runBytes, runs } of plan) {
    let low = 0;
    let high = 0;
    for (const id of ids) {
      low = Math.min(low, id);
      high = Math.max(high, id);
    }
    const cacheEnd = high * cacheBlock + (runs - 1) * cacheRun + runBytes;
    const flatEnd = flatOffset + (ids.length - 1) * flatBlock + (runs - 1) * flatRun + runBytes;
    if (low < 0 || cacheEnd > cacheBytes || flatOffset < 0 || flatEnd > flatBytes) {
      throw new PdError(
        'INTERNAL',
        `a copy up to byte ${cacheEnd} of the cache and ${flatEnd} of the tensor, which have ${cacheBytes} and ${flatBytes}`,
      );
    }
  }
}

function checkSpan(
  layout: PagedLayout,
  blockIds: Int32Array,
  form: WireForm,
  tokens: number,
  skipBlocks: number,
): void {
  const room = Math.min(capacity(form), blockIds.length * layout.blockSize);
  if (tokens > room) {
    throw new PdError('INTERNAL', `${tokens} tokens do not fit a tensor and blocks for ${room}`);
  }
  for (const id of blockIds.subarray(skipBlocks)) {
    if (id < 0 || id >= layout.numBlocks) {
      throw new PdError('INTERNAL', `block ${id} is outside of a KV cache of ${layout.numBlocks} blocks`);
    }
  }
}

function gcd(a: number, b: number): number {
  return b === 0 ? a : gcd(b, a % b);
}
