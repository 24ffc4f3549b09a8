/** What proxy and workers say of a request's KV in HTTP headers (docs/protocol.md, "Discovery"). */
import { ERROR_TABLE, type ErrorCode, type ErrorData } from '../errors.ts';

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

/** Of a producer, with an answer that is well but for this: KV of the prompt will not come. `CODE message`, the message URI-encoded. */
export const KV_FAILED_HEADER = 'x-pd-kv-failed';

/** Characters of the encoded message. */
const LONGEST_MESSAGE = 2_048;

export function writeKvFailed({ code, message }: ErrorData): string {
  const encoded = encodeURIComponent(message.replace(/\p{Surrogate}/gu, '\ufffd'));
  // Cut between two characters, or what is left of an escape could not be read.
  const fits = encoded.length <= LONGEST_MESSAGE;
  return `${code} ${fits ? encoded : encoded.slice(0, LONGEST_MESSAGE).replace(/(?:%[0-9A-F]{0,2})+$/, '')}`;
}

/** Undefined where there is none, or none that makes sense. */
export function readKvFailed(value: unknown): Pick<ErrorData, 'code' | 'message'> | undefined {
  const match = typeof value === 'string' ? /^([A-Z_]{1,64}) (\S{0,2048})$/.exec(value) : null;
  if (!match || !Object.hasOwn(ERROR_TABLE, match[1]!)) return undefined;
  try {
    return { code: match[1] as ErrorCode, message: decodeURIComponent(match[2]!) };
  } catch {
    return undefined;
  }
}
