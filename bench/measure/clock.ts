/** Milliseconds of CLOCK_MONOTONIC: the same clock in every process of one machine, so that a time from one process to another is a subtraction. */
export function monotonicMs(): number {
  return Number(process.hrtime.bigint()) / 1e6;
}
