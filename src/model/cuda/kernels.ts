/** The kernels of kernels/model as typed calls. Everything enqueues on one stream; pointers are device addresses. */
import type { CudaStreamHandle } from '../../../ffi/pointers.ts';
import { type BlockShape, type KernelTarget, loadKernels } from '../../device/cuda/kernels.ts';
import type { DevicePointer } from '../../device/device.ts';
import { PdError } from '../../errors.ts';

/** One table per source: what it declares. */
export const ELEMENTWISE = {
  source: 'model/elementwise',
  kernels: {
    'embed_##T': 'const T *embedding, const int *tokens, float *x, int hidden',
    'rms_norm_##T': 'const float *x, const int *chosen?, const T *weight, T *out, int hidden, float eps',
    'rope_cache_##T': `const T *qkv, const T *bias?, const T *q_norm?, const T *k_norm?, const float *cosine, const float *sine,
      const int *positions, const int *slots, T *q, T *keys, T *values, int rows, int heads, int kv_heads, int dim, float eps`,
    'swiglu_##T': 'const T *gate_up, T *out, int rows, int inner',
  },
} as const;
export const SAMPLE = {
  source: 'model/sample',
  kernels: {
    argmax: 'const float *logits, int *tokens, int vocab',
    draw: 'const float *logits, int *tokens, const Draw *draws, int vocab',
    shape: 'const float *logits, float *shaped, const Shape *shapes, const int *data, u32 *counts, int vocab',
    report: 'const float *logits, const int *tokens, const Wanted *wanted, Report *reports, int vocab',
  },
} as const;
export const ATTENTION_PREFILL = {
  source: 'model/attention_prefill',
  kernels: {
    'attention_prefill_##T##_##D': `const T *q, const T *keys, const T *values, T *out, const Item *items, const int *tables,
      int heads, int kv_heads, int block_size, int shift, float scale`,
  },
} as const;
export const ATTENTION_DECODE = {
  source: 'model/attention_decode',
  kernels: {
    'attention_decode_##T##_##D##_##G': `const T *q, const T *keys, const T *values, const int *query_rows, const int *contexts,
      const int *table_starts, const int *tables, float *partial, float *marks, int heads, int kv_heads, int block_size, int shift,
      int splits, float scale`,
    'attention_combine_##T': `const float *partial, const float *marks, const int *query_rows, const int *contexts, T *out,
      int heads, int dim, int splits`,
  },
} as const;
export const GEMV = {
  source: 'model/gemv',
  kernels: {
    'gemv_##T##_##NAME##_##ROWS': 'const T *x, const T *weight, void *out, int inputs, int outputs',
  },
} as const;
export const GEMM = {
  source: 'model/gemm',
  kernels: {
    'gemm_##T##_##NAME##_large': 'const T *x, const T *weight, void *out, int rows, int inputs, int outputs',
    'gemm_##T##_##NAME##_small': 'const T *x, const T *weight, void *out, int rows, int inputs, int outputs',
  },
} as const;

export type ElementType = 'bfloat16' | 'float16';
/** What the macros of the kernels call them. */
const NAMES = { bfloat16: 'bf16', float16: 'f16' } as const;

/** Head sizes that the attention kernels are compiled for. */
export const HEAD_DIMS = [32, 64, 128] as const;
/** Query heads that one thread block of the decode kernel takes together. */
const GROUPS = [1, 2, 4, 8] as const;
/** Rows up to which the gemv kernels go. */
export const GEMV_ROWS = 2;
/** Query rows of one item of the prefill kernel. */
export const PREFILL_ROWS = 128;

/** What becomes of a product: stored as the element type, added to float32, stored as float32. */
export type ProductMode = 'store' | 'add' | 'logits';

/** weight [outputs, inputs], row-major. */
export interface Matrix {
  readonly pointer: DevicePointer;
  readonly outputs: number;
  readonly inputs: number;
}

/** Device addresses, and numbers, by name. */
export type Addresses<Names extends string> = { readonly [Name in Names]: DevicePointer };
type Numbers<Names extends string> = { readonly [Name in Names]: number };

/** One layer's cache as the kernels see it: K and V of slot s at s * kvHeads * headDim elements. */
export type CachePointers = Addresses<'keys' | 'values'>;

export interface KernelShape {
  readonly type: ElementType;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly blockSize: number;
  readonly eps: number;
}

/** Addresses of what a step's plan put on the device (see step-plan.ts). */
type DecodeRows = Addresses<'queryRows' | 'contexts' | 'tableStarts' | 'tables'> & Numbers<'count'>;

/** x[row] = embedding[tokens[row]]. */
type EmbedArguments = Addresses<'x' | 'tokens'> & Numbers<'rows'> & { readonly embedding: Matrix };

/** out[i] = norm(x[chosen[i]]); `chosen` undefined: the first `rows` rows. */
interface RmsNormArguments extends Addresses<'out' | 'x' | 'weight'>, Numbers<'hidden' | 'rows'> {
  readonly chosen: DevicePointer | undefined;
}

interface RopeCacheArguments extends Addresses<'qkv' | 'positions' | 'slots' | 'q'>, Numbers<'rows'> {
  readonly bias: DevicePointer | undefined;
  readonly queryNorm: DevicePointer | undefined;
  readonly keyNorm: DevicePointer | undefined;
  readonly cache: CachePointers;
}

type SwigluArguments = Addresses<'out' | 'gateUp'> & Numbers<'rows' | 'inner'>;

/** `items`, `count` of them: see kernels/model/attention_prefill.cu. */
interface PrefillArguments extends Addresses<'out' | 'q' | 'items' | 'tables'>, Numbers<'count'> {
  readonly cache: CachePointers;
}

/** `scratch`: as `decodeScratchBytes` says. */
interface DecodeArguments extends Addresses<'out' | 'q' | 'scratch'>, Numbers<'splits'> {
  readonly cache: CachePointers;
  readonly rows: DecodeRows;
}

type ArgmaxArguments = Addresses<'tokens' | 'logits'> & Numbers<'rows' | 'vocab'>;

/** `rows` rows of `shapes`; `data`: what they point into. */
type ShapeArguments = Addresses<'logits' | 'shaped' | 'shapes' | 'data' | 'counts'> &
  Numbers<'rows' | 'vocab'>;

/** `count` rows of `wanted`. */
type ReportArguments = Addresses<'logits' | 'tokens' | 'wanted' | 'reports'> & Numbers<'count' | 'vocab'>;

/** out [rows, outputs] = x [rows, inputs] weight^T. */
export type ProductArguments = Addresses<'out' | 'x'> & Numbers<'rows'> & { readonly weight: Matrix };

export class ModelKernels {
  readonly shape: KernelShape;
  /** Which image was loaded, for the log. */
  readonly image: string;
  readonly #stream: CudaStreamHandle;
  readonly #kernels: Omit<ReturnType<typeof load>, 'image'>;
  /** log2 of the block size, -1 where it is no power of two. */
  readonly #shift: number;
  /** Query heads per thread block of the decode kernel, and thread blocks per KV head. */
  readonly #group: number;
  readonly #parts: number;
  /** For scores as powers of two. */
  readonly #scale: number;
  readonly #angles: Addresses<'cosine' | 'sine'>;

  /**
   * Loads every module. Throws MODEL_UNSUPPORTED for a head size without a kernel, CUDA_ERROR where no image loads, INTERNAL where the
   * sources declare other parameters than the tables above.
   */
  constructor(
    target: KernelTarget,
    stream: CudaStreamHandle,
    shape: KernelShape,
    angles: Addresses<'cosine' | 'sine'>,
  ) {
    const { headDim, heads, kvHeads, blockSize } = shape;
    checkHeadDim(headDim);
    this.shape = shape;
    this.#stream = stream;
    this.#angles = angles;
    this.#shift = Number.isInteger(Math.log2(blockSize)) ? Math.log2(blockSize) : -1;
    const group = heads / kvHeads;
    this.#group = GROUPS.find((size) => size >= group) ?? 8;
    this.#parts = Math.ceil(group / this.#group);
    this.#scale = Math.LOG2E / Math.sqrt(headDim);
    const { image, ...kernels } = load(target, shape, this.#group);
    this.#kernels = kernels;
    this.image = image;
  }

  embed({ x, embedding: { pointer, inputs }, tokens, rows }: EmbedArguments): void {
    this.#kernels.embed.launch(this.#stream, rows, { embedding: pointer, tokens, x, hidden: inputs });
  }

  rmsNorm({ out, x, weight, hidden, rows, chosen }: RmsNormArguments): void {
    const { eps } = this.shape;
    this.#kernels.rmsNorm.launch(this.#stream, rows, { x, chosen, weight, out, hidden, eps });
  }

  ropeCache({ qkv, bias, queryNorm, keyNorm, positions, slots, q, cache, rows }: RopeCacheArguments): void {
    const { heads, kvHeads, headDim, eps } = this.shape;
    const blocks = Math.ceil((rows * (heads + 2 * kvHeads)) / 8);
    this.#kernels.ropeCache.launch(this.#stream, blocks, {
      qkv,
      bias,
      q_norm: queryNorm,
      k_norm: keyNorm,
      cosine: this.#angles.cosine,
      sine: this.#angles.sine,
      positions,
      slots,
      q,
      keys: cache.keys,
      values: cache.values,
      rows,
      heads,
      kv_heads: kvHeads,
      dim: headDim,
      eps,
    });
  }

  swiglu({ out, gateUp, rows, inner }: SwigluArguments): void {
    const blocks = Math.ceil((rows * inner) / 8 / 256);
    this.#kernels.swiglu.launch(this.#stream, blocks, { gate_up: gateUp, out, rows, inner });
  }

  attentionPrefill({ out, q, cache, items, count, tables }: PrefillArguments): void {
    const { heads, kvHeads, blockSize } = this.shape;
    this.#kernels.prefill.launch(this.#stream, count * heads, {
      q,
      keys: cache.keys,
      values: cache.values,
      out,
      items,
      tables,
      heads,
      kv_heads: kvHeads,
      block_size: blockSize,
      shift: this.#shift,
      scale: this.#scale,
    });
  }

  /** Bytes of the partial results of `attentionDecode`, and of their marks behind them. */
  decodeScratchBytes(
    sequences: number,
    splits: number,
  ): { readonly partial: number; readonly marks: number } {
    const rows = sequences * this.shape.heads * splits;
    return { partial: rows * this.shape.headDim * 4, marks: rows * 8 };
  }

  attentionDecode({ out, q, cache, rows, splits, scratch: partial }: DecodeArguments): void {
    const { heads, kvHeads, blockSize, headDim } = this.shape;
    const { queryRows: query_rows, contexts, tableStarts, tables, count } = rows;
    const marks = (partial + BigInt(this.decodeScratchBytes(count, splits).partial)) as DevicePointer;
    this.#kernels.decode.launch(this.#stream, count * kvHeads * this.#parts * splits, {
      q,
      keys: cache.keys,
      values: cache.values,
      query_rows,
      contexts,
      table_starts: tableStarts,
      tables,
      partial,
      marks,
      heads,
      kv_heads: kvHeads,
      block_size: blockSize,
      shift: this.#shift,
      splits,
      scale: this.#scale,
    });
    const combined = { partial, marks, query_rows, contexts, out, heads, dim: headDim, splits };
    this.#kernels.combine.launch(this.#stream, count * heads, combined);
  }

  /** tokens[i] = argmax of logits[i], -1 where there is none. */
  argmax({ tokens, logits, rows, vocab }: ArgmaxArguments): void {
    this.#kernels.argmax.launch(this.#stream, rows, { logits, tokens, vocab });
  }

  /** tokens[i], from `argmax`, redrawn as `draws` says: see kernels/model/sample.cu. */
  draw({ tokens, logits, draws, rows, vocab }: ArgmaxArguments & Addresses<'draws'>): void {
    this.#kernels.draw.launch(this.#stream, rows, { logits, tokens, draws, vocab });
  }

  /** shaped[i] = logits as shapes[i] says: see kernels/model/sample.cu. */
  shapeLogits({ rows, ...args }: ShapeArguments): void {
    this.#kernels.shape.launch(this.#stream, rows, args);
  }

  /** reports[i]: what the logits say of a token, as wanted[i] asks. */
  report({ count, ...args }: ReportArguments): void {
    this.#kernels.report.launch(this.#stream, count, args);
  }

  /** Of at most GEMV_ROWS rows. `swiglu`: `weight` is [2 * outputs, inputs], out is silu(gate) * up. */
  gemv(mode: ProductMode | 'swiglu', { out, x, weight, rows }: ProductArguments): void {
    const { pointer, inputs } = weight;
    const outputs = mode === 'swiglu' ? weight.outputs / 2 : weight.outputs;
    const warps = mode === 'swiglu' ? outputs : Math.ceil(outputs / 2);
    const kernel = this.#kernels.gemv[mode][rows - 1]!;
    kernel.launch(this.#stream, Math.ceil(warps / 8), { x, weight: pointer, out, inputs, outputs });
  }

  /** The product whose sums do not depend on the number of rows. */
  gemm(mode: ProductMode, { out, x, weight, rows }: ProductArguments): void {
    const { pointer, inputs, outputs } = weight;
    const size = rows <= TILES.small.rows ? 'small' : 'large';
    const tile = TILES[size];
    const blocks = Math.ceil(rows / tile.rows) * Math.ceil(outputs / tile.outputs);
    const kernel = this.#kernels.gemm[mode][size];
    kernel.launch(this.#stream, blocks, { x, weight: pointer, out, rows, inputs, outputs });
  }
}

/** The tiles of kernels/model/gemm.cu. */
const TILES = {
  small: { rows: 16, outputs: 64, depth: 64, stages: 4, threads: 128 },
  large: { rows: 128, outputs: 128, depth: 32, stages: 4, threads: 256 },
} as const;

function gemmBlock(tile: (typeof TILES)[keyof typeof TILES]): BlockShape {
  const sharedBytes = tile.stages * (tile.rows + tile.outputs) * (tile.depth + 8) * 2;
  return { threads: tile.threads, sharedBytes };
}

/** 128 query rows, and 64 keys and values twice. */
function prefillBlock(headDim: number): BlockShape {
  const stride = headDim >= 64 ? headDim : headDim + 8;
  return { threads: 256, sharedBytes: (PREFILL_ROWS + 4 * 64) * stride * 2 };
}

function checkHeadDim(headDim: number): void {
  if (HEAD_DIMS.some((known) => known === headDim)) return;
  throw new PdError(
    'MODEL_UNSUPPORTED',
    `heads of ${headDim} elements have no kernel on cuda (only ${HEAD_DIMS.join(', ')}); --executor host computes them`,
  );
}

function load(target: KernelTarget, { type, headDim }: KernelShape, group: number) {
  const T = NAMES[type];
  const elementwise = loadKernels(ELEMENTWISE, target);
  const sample = loadKernels(SAMPLE, target);
  const prefill = loadKernels(ATTENTION_PREFILL, target);
  const decode = loadKernels(ATTENTION_DECODE, target);
  const gemvs = loadKernels(GEMV, target);
  const gemms = loadKernels(GEMM, target);
  const gemv = (mode: ProductMode | 'swiglu') =>
    Array.from({ length: GEMV_ROWS }, (_, i) =>
      gemvs.kernel('gemv_##T##_##NAME##_##ROWS', { T, NAME: mode, ROWS: i + 1 }, { threads: 256 }),
    );
  const gemm = (NAME: ProductMode) => ({
    small: gemms.kernel('gemm_##T##_##NAME##_small', { T, NAME }, gemmBlock(TILES.small)),
    large: gemms.kernel('gemm_##T##_##NAME##_large', { T, NAME }, gemmBlock(TILES.large)),
  });
  const modules = [elementwise, sample, prefill, decode, gemvs, gemms];
  return {
    image: [...new Set(modules.map(({ image }) => image.replace(/^[^.]*\./, '')))].join(', '),
    embed: elementwise.kernel('embed_##T', { T }, { threads: 128 }),
    rmsNorm: elementwise.kernel('rms_norm_##T', { T }, { threads: 256 }),
    ropeCache: elementwise.kernel('rope_cache_##T', { T }, { threads: 256 }),
    swiglu: elementwise.kernel('swiglu_##T', { T }, { threads: 256 }),
    argmax: sample.kernel('argmax', {}, { threads: 1_024 }),
    draw: sample.kernel('draw', {}, { threads: 1_024 }),
    shape: sample.kernel('shape', {}, { threads: 1_024 }),
    report: sample.kernel('report', {}, { threads: 1_024 }),
    prefill: prefill.kernel('attention_prefill_##T##_##D', { T, D: headDim }, prefillBlock(headDim)),
    decode: decode.kernel('attention_decode_##T##_##D##_##G', { T, D: headDim, G: group }, { threads: 128 }),
    combine: decode.kernel('attention_combine_##T', { T }, { threads: headDim }),
    gemv: { store: gemv('store'), add: gemv('add'), logits: gemv('logits'), swiglu: gemv('swiglu') },
    gemm: { store: gemm('store'), add: gemm('add'), logits: gemm('logits') },
  };
}
