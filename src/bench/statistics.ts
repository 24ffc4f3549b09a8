/** Of at least one number. */
export function best(values: readonly number[]): number {
  return Math.min(...values);
}

/** Of at least one number; the lower of the two in the middle. */
export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[(sorted.length - 1) >> 1]!;
}
