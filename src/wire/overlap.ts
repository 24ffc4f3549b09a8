/** What proxy and workers say so that both instances of a pair can be asked at once (docs/protocol.md, "Discovery"). */

/** In the `features` of a ping: this worker may be asked while the other end of its pair is at work. */
export const OVERLAP_FEATURE = 'overlap';

/** To a consumer: KV of this request is still being computed, for at most so many milliseconds. */
export const PREFILL_WITHIN_HEADER = 'x-pd-prefill-within';

/** A longer time counts as this: a day, in milliseconds. */
const LONGEST_MS = 86_400_000;

/** The header's value; undefined where there is none, or none that makes sense. */
export function readPrefillWithin(value: unknown): number | undefined {
  if (typeof value !== 'string' || !/^[1-9]\d{0,14}$/.test(value)) return undefined;
  return Math.min(Number(value), LONGEST_MS);
}
