/** The kernels of kernels/model as typed calls. Everything enqueues on one stream; pointers are device addresses. */
import type { CuFunctionHandle } from '../../../ffi/pointers.ts';
import { type KernelTarget, loadKernels } from '../../device/cuda/kernels.ts';
import type { DevicePointer } from '../../device/device.ts';
import { PdError } from '../../errors.ts';
import type { Launcher } from './launcher.ts';

export type ElementType = 'bfloat16' | 'float16';
/** Names in the kernels. */
const SUFFIX = { bfloat16: 'bf16', float16: 'f16' } as const;

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

/** One layer's cache as the kernels see it: K and V of slot s at s * kvHeads * headDim elements. */
export interface CachePointers {
  readonly keys: DevicePointer;
  readonly values: DevicePointer;
}

export interface KernelShape {
  readonly type: ElementType;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly blockSize: number;
  readonly eps: number;
}

/** Addresses of what a step's plan put on the device (see step-plan.ts). */
export interface DecodeRows {
  readonly queryRows: DevicePointer;
  readonly contexts: DevicePointer;
  readonly tableStarts: DevicePointer;
  readonly tables: DevicePointer;
  readonly count: number;
}

export interface RopeCacheArguments {
  readonly qkv: DevicePointer;
  readonly bias: DevicePointer | undefined;
  readonly queryNorm: DevicePointer | undefined;
  readonly keyNorm: DevicePointer | undefined;
  readonly positions: DevicePointer;
  readonly slots: DevicePointer;
  readonly q: DevicePointer;
  readonly cache: CachePointers;
  readonly rows: number;
}

export class ModelKernels {
  readonly shape: KernelShape;
  /** Which image was loaded, for the log. */
  readonly image: string;
  readonly #launcher: Launcher;
  readonly #functions: Readonly<Record<string, CuFunctionHandle>>;
  readonly #suffix: string;
  /** log2 of the block size, -1 where it is no power of two. */
  readonly #shift: number;
  /** Query heads per thread block of the decode kernel, and thread blocks per KV head. */
  readonly #group: number;
  readonly #parts: number;
  /** For scores as powers of two. */
  readonly #scale: number;
  readonly #angles: { readonly cosine: DevicePointer; readonly sine: DevicePointer };

  /** Loads every module. Throws MODEL_UNSUPPORTED for a head size without a kernel, CUDA_ERROR where no image loads. */
  constructor(
    target: KernelTarget,
    launcher: Launcher,
    shape: KernelShape,
    angles: { readonly cosine: DevicePointer; readonly sine: DevicePointer },
  ) {
    const { headDim, heads, kvHeads, blockSize, type } = shape;
    checkHeadDim(headDim);
    this.shape = shape;
    this.#launcher = launcher;
    this.#angles = angles;
    this.#suffix = SUFFIX[type];
    this.#shift = Number.isInteger(Math.log2(blockSize)) ? Math.log2(blockSize) : -1;
    const group = heads / kvHeads;
    this.#group = GROUPS.find((size) => size >= group) ?? 8;
    this.#parts = Math.ceil(group / this.#group);
    this.#scale = Math.LOG2E / Math.sqrt(headDim);
    const { functions, image } = load(target, this.#suffix, headDim, this.#group);
    this.#functions = functions;
    this.image = image;
    for (const [name, bytes] of Object.entries(this.#sharedBytes())) {
      target.driver.allowSharedBytes(functions[name]!, bytes, name);
    }
  }

  /** x[row] = embedding[tokens[row]]. */
  embed(x: DevicePointer, embedding: Matrix, tokens: DevicePointer, rows: number): void {
    this.#launcher.pointer(embedding.pointer).pointer(tokens).pointer(x).int(embedding.inputs);
    this.#launch('embed', rows, 128);
  }

  /** out[i] = norm(x[chosen[i]]); `chosen` undefined: the first `rows` rows. */
  rmsNorm(
    out: DevicePointer,
    x: DevicePointer,
    weight: DevicePointer,
    hidden: number,
    rows: number,
    chosen?: DevicePointer,
  ): void {
    this.#launcher.pointer(x).pointer(chosen).pointer(weight).pointer(out).int(hidden).float(this.shape.eps);
    this.#launch('rms_norm', rows, 256);
  }

  ropeCache(args: RopeCacheArguments): void {
    const { heads, kvHeads, headDim, eps } = this.shape;
    const { rows, cache } = args;
    this.#launcher
      .pointer(args.qkv)
      .pointer(args.bias)
      .pointer(args.queryNorm)
      .pointer(args.keyNorm)
      .pointer(this.#angles.cosine)
      .pointer(this.#angles.sine)
      .pointer(args.positions)
      .pointer(args.slots)
      .pointer(args.q)
      .pointer(cache.keys)
      .pointer(cache.values)
      .int(rows)
      .int(heads)
      .int(kvHeads)
      .int(headDim)
      .float(eps);
    this.#launch('rope_cache', Math.ceil((rows * (heads + 2 * kvHeads)) / 8), 256);
  }

  swiglu(out: DevicePointer, gateUp: DevicePointer, rows: number, inner: number): void {
    this.#launcher.pointer(gateUp).pointer(out).int(rows).int(inner);
    this.#launch('swiglu', Math.ceil((rows * inner) / 8 / 256), 256);
  }

  /** `items`: see kernels/model/attention_prefill.cu. */
  attentionPrefill(
    out: DevicePointer,
    q: DevicePointer,
    cache: CachePointers,
    items: DevicePointer,
    count: number,
    tables: DevicePointer,
  ): void {
    const { heads, kvHeads, blockSize, headDim } = this.shape;
    this.#launcher.pointer(q).pointer(cache.keys).pointer(cache.values).pointer(out).pointer(items);
    this.#launcher.pointer(tables).int(heads).int(kvHeads).int(blockSize).int(this.#shift).float(this.#scale);
    const name = `attention_prefill_${this.#suffix}_${headDim}`;
    this.#launcher.launch(this.#functions[name]!, count * heads, 256, prefillSharedBytes(headDim));
  }

  /** Bytes of the partial results of `attentionDecode`, and of their marks behind them. */
  decodeScratchBytes(
    sequences: number,
    splits: number,
  ): { readonly partial: number; readonly marks: number } {
    const rows = sequences * this.shape.heads * splits;
    return { partial: rows * this.shape.headDim * 4, marks: rows * 8 };
  }

  attentionDecode(
    out: DevicePointer,
    q: DevicePointer,
    cache: CachePointers,
    rows: DecodeRows,
    splits: number,
    scratch: DevicePointer,
  ): void {
    const { heads, kvHeads, blockSize, headDim } = this.shape;
    const { queryRows, contexts, tableStarts, tables, count } = rows;
    const marks = scratch + BigInt(this.decodeScratchBytes(count, splits).partial);
    this.#launcher.pointer(q).pointer(cache.keys).pointer(cache.values).pointer(queryRows).pointer(contexts);
    this.#launcher.pointer(tableStarts).pointer(tables).pointer(scratch).pointer(marks).int(heads);
    this.#launcher.int(kvHeads).int(blockSize).int(this.#shift).int(splits).float(this.#scale);
    const name = `attention_decode_${this.#suffix}_${headDim}_${this.#group}`;
    this.#launcher.launch(this.#functions[name]!, count * kvHeads * this.#parts * splits, 128);
    this.#launcher.pointer(scratch).pointer(marks).pointer(queryRows).pointer(contexts).pointer(out);
    this.#launcher.int(heads).int(headDim).int(splits);
    this.#launch('attention_combine', count * heads, headDim);
  }

  /** tokens[i] = argmax of logits[i], -1 where there is none. */
  argmax(tokens: DevicePointer, logits: DevicePointer, rows: number, vocab: number): void {
    this.#launcher.pointer(logits).pointer(tokens).int(vocab);
    this.#launcher.launch(this.#functions['argmax']!, rows, 1_024);
  }

  /** tokens[i], from `argmax`, drawn anew as `draws` says: see kernels/model/sample.cu. */
  draw(
    tokens: DevicePointer,
    logits: DevicePointer,
    draws: DevicePointer,
    rows: number,
    vocab: number,
  ): void {
    this.#launcher.pointer(logits).pointer(tokens).pointer(draws).int(vocab);
    this.#launcher.launch(this.#functions['draw']!, rows, 1_024);
  }

  /** Of at most GEMV_ROWS rows. `swiglu`: `weight` is [2 * outputs, inputs], out is silu(gate) * up. */
  gemv(
    mode: ProductMode | 'swiglu',
    out: DevicePointer,
    x: DevicePointer,
    weight: Matrix,
    rows: number,
  ): void {
    const outputs = mode === 'swiglu' ? weight.outputs / 2 : weight.outputs;
    const warps = mode === 'swiglu' ? outputs : Math.ceil(outputs / 2);
    this.#launcher.pointer(x).pointer(weight.pointer).pointer(out).int(weight.inputs).int(outputs);
    const name = `gemv_${this.#suffix}_${mode}_${rows}`;
    this.#launcher.launch(this.#functions[name]!, Math.ceil(warps / 8), 256);
  }

  /** The product whose sums do not hang on the number of rows. */
  gemm(mode: ProductMode, out: DevicePointer, x: DevicePointer, weight: Matrix, rows: number): void {
    const size = rows <= GEMM.small.rows ? 'small' : 'large';
    const tile = GEMM[size];
    this.#launcher.pointer(x).pointer(weight.pointer).pointer(out);
    this.#launcher.int(rows).int(weight.inputs).int(weight.outputs);
    const name = `gemm_${this.#suffix}_${mode}_${size}`;
    const blocks = Math.ceil(rows / tile.rows) * Math.ceil(weight.outputs / tile.outputs);
    this.#launcher.launch(this.#functions[name]!, blocks, tile.threads, gemmSharedBytes(tile));
  }

  #launch(name: string, blocks: number, threads: number): void {
    this.#launcher.launch(this.#functions[`${name}_${this.#suffix}`]!, blocks, threads);
  }

  #sharedBytes(): Record<string, number> {
    const { headDim } = this.shape;
    const bytes: Record<string, number> = {
      [`attention_prefill_${this.#suffix}_${headDim}`]: prefillSharedBytes(headDim),
    };
    for (const mode of ['store', 'add', 'logits']) {
      bytes[`gemm_${this.#suffix}_${mode}_large`] = gemmSharedBytes(GEMM.large);
    }
    return bytes;
  }
}

/** The tiles of kernels/model/gemm.cu. */
const GEMM = {
  small: { rows: 16, outputs: 64, depth: 64, stages: 4, threads: 128 },
  large: { rows: 128, outputs: 128, depth: 32, stages: 4, threads: 256 },
} as const;

function gemmSharedBytes(tile: (typeof GEMM)[keyof typeof GEMM]): number {
  return tile.stages * (tile.rows + tile.outputs) * (tile.depth + 8) * 2;
}

/** 128 query rows, and 64 keys and values twice. */
function prefillSharedBytes(headDim: number): number {
  return (PREFILL_ROWS + 4 * 64) * (headDim >= 64 ? headDim : headDim + 8) * 2;
}

function checkHeadDim(headDim: number): void {
  if (HEAD_DIMS.some((known) => known === headDim)) return;
  throw new PdError(
    'MODEL_UNSUPPORTED',
    `heads of ${headDim} elements have no kernel on cuda (only ${HEAD_DIMS.join(', ')}); --executor host computes them`,
  );
}

function load(target: KernelTarget, suffix: string, headDim: number, group: number) {
  const rows = Array.from({ length: GEMV_ROWS }, (_, i) => i + 1);
  const modes = ['store', 'add', 'logits'];
  const modules: Readonly<Record<string, readonly string[]>> = {
    elementwise: ['embed', 'rms_norm', 'rope_cache', 'swiglu'].map((name) => `${name}_${suffix}`),
    sample: ['argmax', 'draw'],
    attention_prefill: [`attention_prefill_${suffix}_${headDim}`],
    attention_decode: [`attention_decode_${suffix}_${headDim}_${group}`, `attention_combine_${suffix}`],
    gemv: [...modes, 'swiglu'].flatMap((mode) => rows.map((count) => `gemv_${suffix}_${mode}_${count}`)),
    gemm: modes.flatMap((mode) => ['small', 'large'].map((size) => `gemm_${suffix}_${mode}_${size}`)),
  };
  let functions: Record<string, CuFunctionHandle> = {};
  const images = new Set<string>();
  for (const [name, kernels] of Object.entries(modules)) {
    const loaded = loadKernels(`model/${name}`, kernels, target);
    functions = { ...functions, ...loaded.functions };
    images.add(loaded.image.replace(`model/${name}.`, ''));
  }
  return { functions, image: [...images].join(', ') };
}
