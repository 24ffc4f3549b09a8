/** The 16-bit types to float32 and back. Little-endian on both sides, as safetensors files and every platform of ours are. */

/** Element types in which a checkpoint may hold weights. */
export type FloatType = 'float32' | 'float16' | 'bfloat16';

/** Elements as a file holds them, as numbers. Of float32 the same memory. `raw` starts at an element. */
export function toFloat32({ buffer, byteOffset, byteLength }: Uint8Array, type: FloatType): Float32Array {
  if (type === 'float32') return new Float32Array(buffer, byteOffset, byteLength / 4);
  const bits = new Uint16Array(buffer, byteOffset, byteLength / 2);
  const floats = new Float32Array(bits.length);
  (type === 'float16' ? float16ToFloat32 : bfloat16ToFloat32)(bits, floats);
  return floats;
}

let halfTable: Float32Array | undefined;

/** Every float16 as float32, indexed by its bits: 256 KiB, made at first use. */
function halves(): Float32Array {
  halfTable ??= Float32Array.from({ length: 65_536 }, (_, bits) => halfToNumber(bits));
  return halfTable;
}

function halfToNumber(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

export function float16ToFloat32(source: Uint16Array, target: Float32Array): void {
  const table = halves();
  for (let i = 0; i < source.length; i++) target[i] = table[source[i]!]!;
}

/** A bfloat16 is the upper half of a float32. */
export function bfloat16ToFloat32(source: Uint16Array, target: Float32Array): void {
  const bits = new Uint32Array(target.buffer, target.byteOffset, target.length);
  for (let i = 0; i < source.length; i++) bits[i] = source[i]! << 16;
}

/** To the nearest with ties to even, as GPUs round; so does `float32ToFloat16`. */
export function float32ToBfloat16(source: Float32Array, target: Uint16Array): void {
  const bits = new Uint32Array(source.buffer, source.byteOffset, source.length);
  for (let i = 0; i < bits.length; i++) {
    const b = bits[i]!;
    // a NaN stays one: rounding could carry it into infinity
    const isNan = (b & 0x7fff_ffff) > 0x7f80_0000;
    target[i] = isNan ? (b >>> 16) | 0x40 : (b + 0x7fff + ((b >>> 16) & 1)) >>> 16;
  }
}

export function float32ToFloat16(source: Float32Array, target: Uint16Array): void {
  const bits = new Uint32Array(source.buffer, source.byteOffset, source.length);
  for (let i = 0; i < bits.length; i++) target[i] = toFloat16(bits[i]!);
}

function toFloat16(bits: number): number {
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fff_ffff;
  if (magnitude > 0x7f80_0000) return sign | 0x7e00;
  // 65,520 and above round to infinity
  if (magnitude >= 0x477f_f000) return sign | 0x7c00;
  if (magnitude >= 0x3880_0000) {
    const rebased = magnitude - 0x3800_0000;
    return sign | ((rebased + 0xfff + ((rebased >>> 13) & 1)) >>> 13);
  }
  // below 2^-14: steps of 2^-24, and 2^-25 itself rounds to even, which is 0
  const exponent = magnitude >>> 23;
  if (exponent < 102) return sign;
  const shift = 126 - exponent;
  const fraction = (magnitude & 0x7f_ffff) | 0x80_0000;
  const kept = fraction >>> shift;
  const rest = fraction & ((1 << shift) - 1);
  const half = 1 << (shift - 1);
  return sign | (kept + (rest > half || (rest === half && (kept & 1) === 1) ? 1 : 0));
}
