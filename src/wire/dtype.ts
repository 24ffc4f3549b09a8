/** Element types by their name on the wire (torch's without `torch.`) and their size in bytes. FP8 caches travel as uint8. */
export const DTYPE_BYTES = {
  int8: 1,
  uint8: 1,
  int32: 4,
  int64: 8,
  float16: 2,
  float32: 4,
  float64: 8,
  bfloat16: 2,
  float8_e4m3fn: 1,
} as const;

export type Dtype = keyof typeof DTYPE_BYTES;

export function isDtype(name: unknown): name is Dtype {
  return typeof name === 'string' && Object.hasOwn(DTYPE_BYTES, name);
}

/** Bytes of a dense tensor. Exact: the caller has checked the shape against the limits, so the product is a safe integer. */
export function tensorBytes(shape: readonly number[], dtype: Dtype): number {
  return shape.reduce((product, dim) => product * dim, DTYPE_BYTES[dtype]);
}
