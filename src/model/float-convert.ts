/** Checkpoint elements to float32. Little-endian on both sides, as safetensors files and every platform of ours are. */

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
