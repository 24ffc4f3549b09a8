/** Attention of one token over the paged KV cache of its sequence. */
import { type HostLayerCache, slotOf, valuesOffset } from './layer-cache.ts';

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
    let highest = Number.NEGATIVE_INFINITY;
    for (let t = 0; t < tokens; t++) {
      const score = dot(q, qAt, values, slots[t]! * stride + headAt, headDim) * scale;
      scores[t] = score;
      if (score > highest) highest = score;
    }
    sums.fill(0);
    let total = 0;
    for (let t = 0; t < tokens; t++) {
      const weight = Math.exp(scores[t]! - highest);
      total += weight;
      const at = half + slots[t]! * stride + headAt;
      for (let i = 0; i < headDim; i++) sums[i] = sums[i]! + weight * values[at + i]!;
    }
    for (let i = 0; i < headDim; i++) out[qAt + i] = sums[i]! / total;
  }
}

/** Two sums, of the even and the odd elements: headDim is even. */
function dot(a: Float32Array, aAt: number, b: Float32Array, bAt: number, length: number): number {
  let even = 0;
  let odd = 0;
  for (let i = 0; i < length; i += 2) {
    even += a[aAt + i]! * b[bAt + i]!;
    odd += a[aAt + i + 1]! * b[bAt + i + 1]!;
  }
  return even + odd;
}
