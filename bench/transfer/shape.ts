/** Shapes of the KV that the benchmark moves, named after their models. Pure arithmetic. */
import { PdError } from '../../src/errors.ts';
import { blockBytes, type LayoutFamily, type PagedLayout } from '../../src/kv/layout.ts';
import type { Dtype } from '../../src/wire/dtype.ts';

export interface KvShape {
  readonly model: string;
  readonly layers: number;
  readonly family: LayoutFamily;
  /** KV heads; 1 for `mla`. */
  readonly heads: number;
  readonly headDim: number;
  readonly dtype: Dtype;
  /** Tokens per block. */
  readonly blockSize: number;
}

const gqa = (layers: number, heads: number, headDim: number) => ({
  layers,
  heads,
  headDim,
  family: 'kv-first' as const,
  dtype: 'bfloat16' as const,
  blockSize: 16,
});

/** From the models' published config.json. `tiny` is for trying things out. */
export const MODEL_SHAPES = {
  'llama-3-8b': gqa(32, 8, 128),
  'llama-3-70b': gqa(80, 8, 128),
  'qwen2.5-7b': gqa(28, 4, 128),
  'deepseek-v3': { ...gqa(61, 1, 576), family: 'mla' as const },
  tiny: gqa(4, 2, 64),
} satisfies Record<string, Omit<KvShape, 'model'>>;

export type ModelName = keyof typeof MODEL_SHAPES;
export const MODEL_NAMES = Object.keys(MODEL_SHAPES) as readonly ModelName[];

export function modelShape(model: ModelName): KvShape {
  return { model, ...MODEL_SHAPES[model] };
}

export function layerName(layer: number): string {
  return `model.layers.${layer}.self_attn.attn`;
}

export function blocksOf(shape: KvShape, tokens: number): number {
  return Math.ceil(tokens / shape.blockSize);
}

/**
 * Blocks of the paged caches that hold a request of `blocks` blocks: some more, so that block tables have gaps, and it can be checked
 * that what is between the request's blocks does not change.
 */
export function cacheBlocks(blocks: number): number {
  return blocks + Math.max(4, blocks >> 2);
}

export function layoutOf(shape: KvShape, numBlocks: number): PagedLayout {
  const { family, blockSize, heads, headDim, dtype } = shape;
  return { family, numBlocks, blockSize, heads, headDim, dtype };
}

/** Bytes of one layer's tensor for `tokens` tokens, in whole blocks. */
export function tensorBytesOf(shape: KvShape, tokens: number): number {
  return blocksOf(shape, tokens) * blockBytes(layoutOf(shape, 1));
}

/** `count` different blocks of `numBlocks`, in an order that depends only on `seed`. */
export function blockTable(seed: number, count: number, numBlocks: number): Int32Array {
  if (count > numBlocks) throw new PdError('INTERNAL', `${count} blocks of a cache of ${numBlocks}`);
  const ids = Int32Array.from({ length: numBlocks }, (_, id) => id);
  const next = xorshift(seed);
  for (let at = 0; at < count; at++) {
    const other = at + (next() % (numBlocks - at));
    [ids[at], ids[other]] = [ids[other]!, ids[at]!];
  }
  return ids.slice(0, count);
}

/** Marsaglia's 32-bit xorshift: the same numbers from the same seed in every process. */
export function xorshift(seed: number): () => number {
  let state = (Math.imul(seed + 1, 0x9e3779b1) ^ 0x85ebca6b) >>> 0 || 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state;
  };
}

/** The 8B shape computes 2,016 tokens in 45.4 ms on an H200, 1.4 ms a layer; an iteration takes about one. */
const TOKENS_PER_ITERATION = 1_400;

/** Of the product loop, for one layer of a prompt of so many tokens: about as long as one of the 8B shape takes. */
export function iterationsOf(tokens: number): number {
  return Math.max(Math.round(tokens / TOKENS_PER_ITERATION), 1);
}
