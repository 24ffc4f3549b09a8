/** Attention of one token over the paged KV cache of its sequence. */
import { slotOf } from '../rows.ts';
import { type HostLayerCache, valuesOffset } from './layer-cache.ts';

/** Reused between calls; grows with the longest sequence. */
export class AttentionScratch {
  scores = new Float64Array(256);
  slots = new Int32Array(256);
  readonly sums: Float64Array;

  constructor(headDim: number) {
    this.sums = new Float64Array(headDim);
  }

  fit(tokens: number): void {
    if (tokens <= this.scores.length) return;
    const length = 2 ** Math.ceil(Math.log2(tokens));
    this.scores = new Float64Array(length);
    this.slots = new Int32Array(length);
  }
}

/**
 * out[row] = softmax(q[row] K^T / sqrt(headDim)) V over positions 0..position of the sequence, in order. q and out
 * [rows, heads, headDim]; query head h reads KV head floor(h / (heads / kvHeads)).
 */
export function attend(
  out: Float32Array,
  q: Float32Array,
  row: number,
  heads: number,
  cache: HostLayerCache,
  blockTable: Int32Array,
  position: number,
  scratch: AttentionScratch,
): void {
  const { layout, values } = cache;
  const { headDim, heads: kvHeads, blockSize } = layout;
  const tokens = position + 1;
  scratch.fit(tokens);
  const { scores, slots, sums } = scratch;
  for (let t = 0; t < tokens; t++) slots[t] = slotOf(blockTable, blockSize, t);
  const scale = 1 / Math.sqrt(headDim);
  const stride = kvHeads * headDim;
  const half = valuesOffset(layout);
  const group = heads / kvHeads;
  for (let h = 0; h < heads; h++) {
    const qAt = (row * heads + h) * headDim;
    const headAt = Math.floor(h / group) * headDim;
    const highest = scoreAll(scores, q, qAt, values, slots, tokens, stride, headAt, headDim, scale);
    let total = 0;
    for (let t = 0; t < tokens; t++) {
      const weight = Math.exp(scores[t]! - highest);
      scores[t] = weight;
      total += weight;
    }
    sums.fill(0);
    sumValues(sums, scores, values, slots, tokens, stride, half + headAt, headDim);
    for (let i = 0; i < headDim; i++) out[qAt + i] = sums[i]! / total;
  }
}

/** scores[t] = scale * q . k[t], four tokens at a time; the highest of them. Each is one sum in index order. */
function scoreAll(
  scores: Float64Array,
  q: Float32Array,
  qAt: number,
  values: Float32Array,
  slots: Int32Array,
  tokens: number,
  stride: number,
  headAt: number,
  headDim: number,
  scale: number,
): number {
  let highest = Number.NEGATIVE_INFINITY;
  let t = 0;
  for (; t + 3 < tokens; t += 4) {
    const k0 = slots[t]! * stride + headAt;
    const k1 = slots[t + 1]! * stride + headAt;
    const k2 = slots[t + 2]! * stride + headAt;
    const k3 = slots[t + 3]! * stride + headAt;
    let s0 = 0;
    let s1 = 0;
    let s2 = 0;
    let s3 = 0;
    for (let i = 0; i < headDim; i++) {
      const a = q[qAt + i]!;
      s0 += a * values[k0 + i]!;
      s1 += a * values[k1 + i]!;
      s2 += a * values[k2 + i]!;
      s3 += a * values[k3 + i]!;
    }
    scores[t] = s0 * scale;
    scores[t + 1] = s1 * scale;
    scores[t + 2] = s2 * scale;
    scores[t + 3] = s3 * scale;
  }
  for (; t < tokens; t++) {
    const k = slots[t]! * stride + headAt;
    let sum = 0;
    for (let i = 0; i < headDim; i++) sum += q[qAt + i]! * values[k + i]!;
    scores[t] = sum * scale;
  }
  for (t = 0; t < tokens; t++) if (scores[t]! > highest) highest = scores[t]!;
  return highest;
}

/** sums[i] += weights[t] * v[t][i], for t in order; four tokens at a time, added one after another as singly. */
function sumValues(
  sums: Float64Array,
  weights: Float64Array,
  values: Float32Array,
  slots: Int32Array,
  tokens: number,
  stride: number,
  valuesAt: number,
  headDim: number,
): void {
  let t = 0;
  for (; t + 3 < tokens; t += 4) {
    const v0 = slots[t]! * stride + valuesAt;
    const v1 = slots[t + 1]! * stride + valuesAt;
    const v2 = slots[t + 2]! * stride + valuesAt;
    const v3 = slots[t + 3]! * stride + valuesAt;
    const w0 = weights[t]!;
    const w1 = weights[t + 1]!;
    const w2 = weights[t + 2]!;
    const w3 = weights[t + 3]!;
    for (let i = 0; i < headDim; i++) {
      let sum = sums[i]!;
      sum += w0 * values[v0 + i]!;
      sum += w1 * values[v1 + i]!;
      sum += w2 * values[v2 + i]!;
      sum += w3 * values[v3 + i]!;
      sums[i] = sum;
    }
  }
  for (; t < tokens; t++) {
    const v = slots[t]! * stride + valuesAt;
    const weight = weights[t]!;
    for (let i = 0; i < headDim; i++) sums[i] = sums[i]! + weight * values[v + i]!;
  }
}
