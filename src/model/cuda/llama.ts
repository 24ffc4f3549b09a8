/**
 * A Llama on the GPU, as work on one stream. Activations live in memory that is taken once; nothing here waits, allocates or reads back,
 * so a whole step can be recorded into a graph.
 *
 *   x [rows, hidden] float32, the residual stream; everything else the checkpoint's 16-bit type
 *   per layer: norm -> qkv -> (bias, q/k norm) RoPE, K and V into the cache -> attention -> output, added to x
 *              norm -> gate, up -> SwiGLU -> down, added to x
 */
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { DevicePointer } from '../../device/device.ts';
import type { ModelConfig } from '../config.ts';
import type { Addresses, CachePointers, ModelKernels } from './kernels.ts';
import type { Products } from './products.ts';
import type { StepPlan } from './step-plan.ts';
import type { CudaLayerWeights, CudaWeights } from './weights.ts';

export interface LlamaLimits {
  /** Rows of one step. */
  readonly rows: number;
  readonly sequences: number;
  /** Rows of logits at a time. */
  readonly logitRows: number;
  /** Tokens beyond those of the rows of logits: what is drawn from other logits. */
  readonly moreTokens: number;
}

/** The decode kernel splits contexts into enough thread blocks for this many per multiprocessor. */
const BLOCKS_PER_MULTIPROCESSOR = 4;
const MAX_SPLITS = 64;

export interface ScoredRows {
  readonly chosen?: DevicePointer;
  readonly first?: number;
  readonly draws?: DevicePointer;
}

type Activations = Addresses<
  'x' | 'normed' | 'qkv' | 'q' | 'attended' | 'gateUp' | 'gated' | 'decode' | 'chosen' | 'logits' | 'tokens'
>;

export class CudaLlama {
  readonly #config: ModelConfig;
  readonly #weights: CudaWeights;
  readonly #kernels: ModelKernels;
  readonly #products: Products;
  readonly #multiProcessors: number;
  readonly #at: Activations;
  #caches: readonly CachePointers[] = [];

  /** Takes the memory of all activations. Throws OUT_OF_DEVICE_MEMORY. */
  constructor(
    device: CudaDevice,
    config: ModelConfig,
    weights: CudaWeights,
    kernels: ModelKernels,
    products: Products,
    limits: LlamaLimits,
  ) {
    this.#config = config;
    this.#weights = weights;
    this.#kernels = kernels;
    this.#products = products;
    this.#multiProcessors = device.multiProcessors;
    this.#at = this.#allocate(device, limits);
  }

  /** Before the first step. One per layer. */
  useCaches(caches: readonly CachePointers[]): void {
    this.#caches = caches;
  }

  get logits(): DevicePointer {
    return this.#at.logits;
  }

  /** The token of each row of the logits, int32, and room for `moreTokens` others; -1 where the logits hold no usable distribution. */
  get tokens(): DevicePointer {
    return this.#at.tokens;
  }

  embed(plan: StepPlan, step: DevicePointer): void {
    const { embedding } = this.#weights;
    const tokens = word(step, plan.at.tokens);
    this.#kernels.embed({ x: this.#at.x, embedding, tokens, rows: plan.counts.rows });
  }

  /** Until the layer's KV of this step is in the cache. */
  project(layer: number, plan: StepPlan, step: DevicePointer): void {
    const weights = this.#layer(layer);
    const { x, normed, qkv, q } = this.#at;
    const { rows } = plan.counts;
    const { hidden } = this.#config;
    this.#kernels.rmsNorm({ out: normed, x, weight: weights.inputNorm, hidden, rows, chosen: undefined });
    this.#products.product('store', { out: qkv, x: normed, weight: weights.qkv, rows });
    this.#kernels.ropeCache({
      qkv,
      bias: weights.qkvBias,
      queryNorm: weights.queryNorm,
      keyNorm: weights.keyNorm,
      positions: word(step, plan.at.positions),
      slots: word(step, plan.at.slots),
      q,
      cache: this.#caches[layer]!,
      rows,
    });
  }

  /** The rest of the layer. */
  finish(layer: number, plan: StepPlan, step: DevicePointer): void {
    const weights = this.#layer(layer);
    const { x, normed, attended, gateUp, gated } = this.#at;
    const { rows } = plan.counts;
    this.#attend(layer, plan, step);
    this.#products.product('add', { out: x, x: attended, weight: weights.output, rows });
    const { hidden } = this.#config;
    this.#kernels.rmsNorm({ out: normed, x, weight: weights.postNorm, hidden, rows, chosen: undefined });
    this.#products.gated({ out: gated, x: normed, gateUp: weights.gateUp, rows, scratch: gateUp });
    this.#products.product('add', { out: x, x: gated, weight: weights.down, rows });
  }

  /**
   * Logits and tokens of `count` rows: those listed at `chosen`, or `count` rows from `first` on. Tokens are drawn as the rows at `draws`
   * say; without them they are the most likely ones.
   */
  score(count: number, { chosen, first = 0, draws }: ScoredRows): void {
    const { hidden, vocab } = this.#config;
    const { chosen: normed, logits, tokens } = this.#at;
    const { finalNorm, head } = this.#weights;
    const x = (this.#at.x + BigInt(first * hidden * 4)) as DevicePointer;
    this.#kernels.rmsNorm({ out: normed, x, weight: finalNorm, hidden, rows: count, chosen });
    this.#products.product('logits', { out: logits, x: normed, weight: head, rows: count });
    this.#kernels.argmax({ tokens, logits, rows: count, vocab });
    if (draws !== undefined) this.#kernels.draw({ tokens, logits, draws, rows: count, vocab });
  }

  #attend(layer: number, plan: StepPlan, step: DevicePointer): void {
    const { q, attended: out, decode: scratch } = this.#at;
    const { counts, at } = plan;
    const cache = this.#caches[layer]!;
    const tables = word(step, at.tables);
    if (counts.items > 0) {
      const items = word(step, at.items);
      this.#kernels.attentionPrefill({ out, q, cache, items, count: counts.items, tables });
    }
    if (counts.decodes > 0) {
      const rows = {
        queryRows: word(step, at.queryRows),
        contexts: word(step, at.contexts),
        tableStarts: word(step, at.tableStarts),
        tables,
        count: counts.decodes,
      };
      const splits = this.#splits(counts.decodes);
      this.#kernels.attentionDecode({ out, q, cache, rows, splits, scratch });
    }
  }

  #splits(sequences: number): number {
    const wanted = this.#multiProcessors * BLOCKS_PER_MULTIPROCESSOR;
    return Math.min(MAX_SPLITS, Math.ceil(wanted / (sequences * this.#config.kvHeads)));
  }

  #layer(index: number): CudaLayerWeights {
    return this.#weights.layers[index]!;
  }

  /** What attention needs and what the feed-forward block needs never live at the same time, so they share memory. */
  #allocate(device: CudaDevice, { rows, sequences, logitRows, moreTokens }: LlamaLimits): Activations {
    const { hidden, heads, kvHeads, headDim, intermediate, vocab } = this.#config;
    const round = (bytes: number) => Math.ceil(bytes / 256) * 256;
    const qkvBytes = round(2 * rows * (heads + 2 * kvHeads) * headDim);
    const qBytes = round(2 * rows * heads * headDim);
    const gateUpBytes = round(2 * rows * 2 * intermediate);
    const gatedBytes = round(2 * rows * intermediate);
    const shared = device.allocate(
      Math.max(qkvBytes + 2 * qBytes, gateUpBytes + gatedBytes),
      `activations of ${rows} tokens`,
    ).pointer;
    let decodeBytes = 0;
    for (let count = 1; count <= sequences; count++) {
      const { partial, marks } = this.#kernels.decodeScratchBytes(count, this.#splits(count));
      decodeBytes = Math.max(decodeBytes, partial + marks);
    }
    const offset = (bytes: number) => (shared + BigInt(bytes)) as DevicePointer;
    const take = (bytes: number, what: string) => device.allocate(bytes, what).pointer;
    return {
      x: take(4 * rows * hidden, 'residual stream'),
      normed: take(2 * rows * hidden, 'normed activations'),
      qkv: shared,
      q: offset(qkvBytes),
      attended: offset(qkvBytes + qBytes),
      gateUp: shared,
      gated: offset(gateUpBytes),
      decode: take(decodeBytes, 'partial attention'),
      chosen: take(2 * logitRows * hidden, 'rows to score'),
      logits: take(4 * logitRows * vocab, 'logits'),
      tokens: take(4 * (logitRows + moreTokens), 'tokens'),
    };
  }
}

/** Address of int32 word `index`. */
export function word(base: DevicePointer, index: number): DevicePointer {
  return (base + BigInt(4 * index)) as DevicePointer;
}
