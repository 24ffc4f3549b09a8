/** Summaries of measured values. Pure. */

export interface Spread {
  readonly count: number;
  readonly mean: number;
  readonly p50: number;
  readonly p90: number;
  readonly p99: number;
  readonly max: number;
}

/**
 * The value at rank `(n - 1) * p / 100` of n ascending values, counted from 0, interpolated linearly between ranks: numpy's default, so that
 * the numbers compare with those of vLLM's benchmark. `p` is 0 to 100; there must be at least one value.
 */
export function percentile(ascending: ArrayLike<number>, p: number): number {
  const rank = ((ascending.length - 1) * p) / 100;
  const below = ascending[Math.floor(rank)]!;
  const above = ascending[Math.ceil(rank)]!;
  return below + (above - below) * (rank - Math.floor(rank));
}

/** Undefined without values. */
export function spreadOf(values: readonly number[]): Spread | undefined {
  if (values.length === 0) return undefined;
  const ascending = Float64Array.from(values).sort();
  const at = (p: number) => percentile(ascending, p);
  return {
    count: values.length,
    mean: meanOf(values),
    p50: at(50),
    p90: at(90),
    p99: at(99),
    max: ascending[ascending.length - 1]!,
  };
}

/** Of at least one value. */
export function meanOf(values: readonly number[]): number {
  return sumOf(values) / values.length;
}

export function sumOf(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0);
}

/** Of at least one number. */
export function best(values: readonly number[]): number {
  return Math.min(...values);
}

/** Of at least one number; the lower of the two in the middle. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[(sorted.length - 1) >> 1]!;
}
