/**
 * The arithmetic of a Llama on host memory, float32 in and out.
 *
 * Every output is one sum in index order, in double precision, rounded once when stored. So a result depends on its own row alone, not on
 * how many rows are computed with it or how they are tiled: a prompt computed in chunks, in a batch or by another worker gives the same
 * bits. Rows are tokens; matrices are row-major.
 */

import type { RopeAngles } from '../rope-config.ts';

/** out[r, o] = sum over i of x[r, i] * weight[o, i]. x [rows, inputs], weight [outputs, inputs], out [rows, outputs]. */
export function matmul(
  out: Float32Array,
  x: Float32Array,
  weight: Float32Array,
  rows: number,
  inputs: number,
  outputs: number,
): void {
  const tiled = outputs - (outputs % 4);
  // A strip of weights small enough for the first-level cache is used for all rows before the next is read.
  for (let o = 0; o < tiled; o += 4) {
    let r = 0;
    for (; r + 1 < rows; r += 2) matmul2x4(out, x, weight, r, o, inputs, outputs);
    if (r < rows) matmul1x4(out, x, weight, r, o, inputs, outputs);
  }
  for (let o = tiled; o < outputs; o++) {
    for (let r = 0; r < rows; r++) {
      let sum = 0;
      for (let i = 0; i < inputs; i++) sum += x[r * inputs + i]! * weight[o * inputs + i]!;
      out[r * outputs + o] = sum;
    }
  }
}

/** One row, four outputs: four independent sums keep the adder busy. */
function matmul1x4(
  out: Float32Array,
  x: Float32Array,
  weight: Float32Array,
  r: number,
  o: number,
  inputs: number,
  outputs: number,
): void {
  const xr = r * inputs;
  const w0 = o * inputs;
  const w1 = w0 + inputs;
  const w2 = w1 + inputs;
  const w3 = w2 + inputs;
  let s0 = 0;
  let s1 = 0;
  let s2 = 0;
  let s3 = 0;
  for (let i = 0; i < inputs; i++) {
    const a = x[xr + i]!;
    s0 += a * weight[w0 + i]!;
    s1 += a * weight[w1 + i]!;
    s2 += a * weight[w2 + i]!;
    s3 += a * weight[w3 + i]!;
  }
  const at = r * outputs + o;
  out[at] = s0;
  out[at + 1] = s1;
  out[at + 2] = s2;
  out[at + 3] = s3;
}

/** Two rows, four outputs: each weight is loaded once for both rows. */
function matmul2x4(
  out: Float32Array,
  x: Float32Array,
  weight: Float32Array,
  r: number,
  o: number,
  inputs: number,
  outputs: number,
): void {
  const xa = r * inputs;
  const xb = xa + inputs;
  const w0 = o * inputs;
  const w1 = w0 + inputs;
  const w2 = w1 + inputs;
  const w3 = w2 + inputs;
  let a0 = 0;
  let a1 = 0;
  let a2 = 0;
  let a3 = 0;
  let b0 = 0;
  let b1 = 0;
  let b2 = 0;
  let b3 = 0;
  for (let i = 0; i < inputs; i++) {
    const a = x[xa + i]!;
    const b = x[xb + i]!;
    const k0 = weight[w0 + i]!;
    a0 += a * k0;
    b0 += b * k0;
    const k1 = weight[w1 + i]!;
    a1 += a * k1;
    b1 += b * k1;
    const k2 = weight[w2 + i]!;
    a2 += a * k2;
    b2 += b * k2;
    const k3 = weight[w3 + i]!;
    a3 += a * k3;
    b3 += b * k3;
  }
  const at = r * outputs + o;
  out[at] = a0;
  out[at + 1] = a1;
  out[at + 2] = a2;
  out[at + 3] = a3;
  const bt = at + outputs;
  out[bt] = b0;
  out[bt + 1] = b1;
  out[bt + 2] = b2;
  out[bt + 3] = b3;
}

/** out = x / rms(x) * weight, row by row. x and out [rows, width], weight [width]. */
export function rmsNorm(
  out: Float32Array,
  x: Float32Array,
  weight: Float32Array,
  rows: number,
  eps: number,
): void {
  const width = weight.length;
  for (let r = 0; r < rows; r++) {
    const at = r * width;
    let squares = 0;
    for (let i = 0; i < width; i++) {
      const value = x[at + i]!;
      squares += value * value;
    }
    const scale = 1 / Math.sqrt(squares / width + eps);
    for (let i = 0; i < width; i++) out[at + i] = x[at + i]! * scale * weight[i]!;
  }
}

/** Rotates x [rows, heads, headDim] in place; element i pairs with i + headDim / 2 (half-split order). */
export function applyRope(
  x: Float32Array,
  angles: RopeAngles,
  rows: number,
  heads: number,
  headDim: number,
): void {
  const half = headDim / 2;
  for (let r = 0; r < rows; r++) {
    for (let h = 0; h < heads; h++) {
      const at = (r * heads + h) * headDim;
      for (let i = 0; i < half; i++) {
        const cos = angles.cos[r * half + i]!;
        const sin = angles.sin[r * half + i]!;
        const low = x[at + i]!;
        const high = x[at + half + i]!;
        x[at + i] = low * cos - high * sin;
        x[at + half + i] = high * cos + low * sin;
      }
    }
  }
}

/** gate = silu(gate) * up, over the first `count` elements. */
export function swiglu(gate: Float32Array, up: Float32Array, count: number): void {
  for (let i = 0; i < count; i++) {
    const g = gate[i]!;
    gate[i] = (g / (1 + Math.exp(-g))) * up[i]!;
  }
}

/** target += source, over the first `count` elements. */
export function addInto(target: Float32Array, source: Float32Array, count: number): void {
  for (let i = 0; i < count; i++) target[i] = target[i]! + source[i]!;
}

/** Adds `bias` [width] to each row of x [rows, width]. */
export function addBias(x: Float32Array, bias: Float32Array, rows: number): void {
  for (let r = 0; r < rows; r++) addInto(x.subarray(r * bias.length), bias, bias.length);
}
