/**
 * A Llama on the host, float32, over a paged KV cache. Readable before fast: it is also the reference for GPU kernels.
 *
 *   rows = all tokens of all sequences of a step, one after another
 *   per layer: norm -> q, k, v -> RoPE -> KV into the cache -> attention over the cache -> output -> + residual
 *              norm -> gate, up -> SwiGLU -> down -> + residual
 *
 * A row's result depends on its own sequence alone (see kernels.ts), so chunks and batches never change a bit.
 */
import type { ScheduledSequence } from '../../scheduler/types.ts';
import type { ModelConfig } from '../config.ts';
import { allocateAngles, type RopeAngles, ropeFrequencies, writeAngles } from '../rope-config.ts';
import { placeTokens, rowCount } from '../rows.ts';
import { AttentionScratch, attend } from './attention.ts';
import { addBias, addInto, applyRope, matmul, rmsNorm, swiglu } from './kernels.ts';
import { type HostLayerCache, writeKv } from './layer-cache.ts';
import type { LlamaLayerWeights, LlamaWeights } from './weights.ts';

/** The step's KV of `layer` is in the cache. */
export type Written = (layer: number) => Promise<void> | void;

export class HostLlama {
  readonly config: ModelConfig;
  readonly #weights: LlamaWeights;
  readonly #caches: readonly HostLayerCache[];
  readonly #frequencies: Float64Array;
  readonly #attention: AttentionScratch;
  #scratch: Activations;

  constructor(config: ModelConfig, weights: LlamaWeights, caches: readonly HostLayerCache[]) {
    this.config = config;
    this.#weights = weights;
    this.#caches = caches;
    this.#frequencies = ropeFrequencies(config.rope, config.headDim);
    this.#attention = new AttentionScratch(config.headDim);
    this.#scratch = allocateActivations(config, 16);
  }

  /** Runs the step and writes its KV. The residual stream of all rows, [rows, hidden], valid until the next call. */
  async hidden(sequences: readonly ScheduledSequence[], written: Written): Promise<Float32Array> {
    const rows = this.#rowsOf(sequences);
    const count = rows.tokens.length;
    if (count > this.#scratch.rows) this.#scratch = allocateActivations(this.config, count);
    const { x } = this.#scratch;
    this.#embed(x, rows.tokens);
    const angles = allocateAngles(count, this.#frequencies);
    rows.positions.forEach((position, row) => {
      writeAngles(angles, row, position, this.#frequencies);
    });
    for (let layer = 0; layer < this.config.layers; layer++) {
      const weights = this.#weights.layers[layer]!;
      this.#project(weights, count, angles, layer, rows.slots);
      const uploaded = written(layer);
      if (uploaded) await uploaded;
      this.#attend(weights, layer, sequences, count);
      this.#feedForward(weights, count);
    }
    return x;
  }

  /** Logits of the chosen rows of the residual stream, [rows.length, vocab]. */
  logits(hidden: Float32Array, rows: readonly number[]): Float32Array {
    const { hidden: width, vocab, rmsNormEps } = this.config;
    const chosen = new Float32Array(rows.length * width);
    rows.forEach((row, i) => {
      chosen.set(hidden.subarray(row * width, (row + 1) * width), i * width);
    });
    rmsNorm(chosen, chosen, this.#weights.finalNorm, rows.length, rmsNormEps);
    const logits = new Float32Array(rows.length * vocab);
    matmul(logits, chosen, this.#weights.head, rows.length, width, vocab);
    return logits;
  }

  #rowsOf(sequences: readonly ScheduledSequence[]): Rows {
    const count = rowCount(sequences);
    const rows: Rows = {
      tokens: new Int32Array(count),
      positions: new Int32Array(count),
      slots: new Int32Array(count),
    };
    const limits = { ...this.#caches[0]!.layout, vocab: this.config.vocab };
    let row = 0;
    for (const sequence of sequences) {
      placeTokens(sequence, limits, (_, token, position, slot) => {
        rows.tokens[row] = token;
        rows.positions[row] = position;
        rows.slots[row++] = slot;
      });
    }
    return rows;
  }

  #embed(x: Float32Array, tokens: Int32Array): void {
    const { hidden } = this.config;
    tokens.forEach((token, row) => {
      x.set(this.#weights.embedding.subarray(token * hidden, (token + 1) * hidden), row * hidden);
    });
  }

  #project(
    weights: LlamaLayerWeights,
    rows: number,
    angles: RopeAngles,
    layer: number,
    slots: Int32Array,
  ): void {
    const { hidden, heads, kvHeads, headDim, rmsNormEps } = this.config;
    const { x, normed, q, k, v } = this.#scratch;
    rmsNorm(normed, x, weights.inputNorm, rows, rmsNormEps);
    matmul(q, normed, weights.query, rows, hidden, heads * headDim);
    matmul(k, normed, weights.key, rows, hidden, kvHeads * headDim);
    matmul(v, normed, weights.value, rows, hidden, kvHeads * headDim);
    const { bias, headNorm } = weights;
    if (bias) {
      addBias(q, bias.query, rows);
      addBias(k, bias.key, rows);
      addBias(v, bias.value, rows);
    }
    if (headNorm) {
      rmsNorm(q, q, headNorm.query, rows * heads, rmsNormEps);
      rmsNorm(k, k, headNorm.key, rows * kvHeads, rmsNormEps);
    }
    applyRope(q, angles, rows, heads, headDim);
    applyRope(k, angles, rows, kvHeads, headDim);
    for (let row = 0; row < rows; row++) writeKv(this.#caches[layer]!, slots[row]!, k, v, row);
  }

  #attend(
    weights: LlamaLayerWeights,
    layer: number,
    sequences: readonly ScheduledSequence[],
    rows: number,
  ): void {
    const { hidden, heads, headDim } = this.config;
    const { x, q, attended, projected } = this.#scratch;
    let row = 0;
    for (const { tokens, start, blockTable } of sequences) {
      for (let i = 0; i < tokens.length; i++, row++) {
        attend(attended, q, row, heads, this.#caches[layer]!, blockTable, start + i, this.#attention);
      }
    }
    matmul(projected, attended, weights.output, rows, heads * headDim, hidden);
    addInto(x, projected, rows * hidden);
  }

  #feedForward(weights: LlamaLayerWeights, rows: number): void {
    const { hidden, intermediate, rmsNormEps } = this.config;
    const { x, normed, gate, up, projected } = this.#scratch;
    rmsNorm(normed, x, weights.postNorm, rows, rmsNormEps);
    matmul(gate, normed, weights.gate, rows, hidden, intermediate);
    matmul(up, normed, weights.up, rows, hidden, intermediate);
    swiglu(gate, up, rows * intermediate);
    matmul(projected, gate, weights.down, rows, intermediate, hidden);
    addInto(x, projected, rows * hidden);
  }
}

interface Rows {
  readonly tokens: Int32Array;
  readonly positions: Int32Array;
  readonly slots: Int32Array;
}

type Activations = ReturnType<typeof allocateActivations>;

/** Of one step, reused by all layers. */
function allocateActivations({ hidden, heads, kvHeads, headDim, intermediate }: ModelConfig, rows: number) {
  const floats = (width: number) => new Float32Array(rows * width);
  return {
    rows,
    x: floats(hidden),
    normed: floats(hidden),
    q: floats(heads * headDim),
    k: floats(kvHeads * headDim),
    v: floats(kvHeads * headDim),
    attended: floats(heads * headDim),
    projected: floats(hidden),
    gate: floats(intermediate),
    up: floats(intermediate),
  };
}
