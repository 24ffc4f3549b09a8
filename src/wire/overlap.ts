/** What proxy and workers tell each other about a request's KV in HTTP headers (docs/protocol.md, "Discovery"). */
import { ERROR_TABLE, type ErrorCode, type ErrorContext, type ErrorData } from '../errors.ts';

/** In the `features` of a ping: both ends of a pair of such workers may get a request at the same time. */
export const OVERLAP_FEATURE = 'overlap';

/** Likewise, and in its hello: this worker supports the native hand-over. */
export const NATIVE_FEATURE = 'native';

/** Likewise: its HTTP server takes TLS alone. */
export const TLS_FEATURE = 'tls';

/** To a consumer: the KV of this request is still being computed, for at most this many milliseconds. */
export const PREFILL_WITHIN_HEADER = 'x-pd-prefill-within';

/** A longer time counts as this: a day, in milliseconds. */
const LONGEST_MS = 86_400_000;

/** The header's value; undefined if it is absent or invalid. */
export function readPrefillWithin(value: unknown): number | undefined {
  if (typeof value !== 'string' || !/^[1-9]\d{0,14}$/.test(value)) return undefined;
  return Math.min(Number(value), LONGEST_MS);
}

/**
 * To a producer: how many tokens the request is to generate, of which its copy asks for one. Of a prompt that is cut off to fit the context
 * (`truncate_prompt_tokens: -1`) both ends keep as much by this.
 */
export const OUTPUT_TOKENS_HEADER = 'x-pd-output-tokens';

/** The header's value; undefined if it is absent or invalid. */
export function readOutputTokens(value: unknown): number | undefined {
  return typeof value === 'string' && /^[1-9]\d{0,14}$/.test(value) ? Number(value) : undefined;
}

/** To both ends of a pair: the wire that this request's KV takes. Without it both use the frozen one. */
export const WIRE_HEADER = 'x-pd-wire';

export const WIRES = ['native', 'frozen'] as const;
/** `native`: written into place between pd-workers (transfer/native). `frozen`: NEW, PUT and GET. */
export type Wire = (typeof WIRES)[number];

/** The header's value; undefined if it is absent or invalid. */
export function readWire(value: unknown): Wire | undefined {
  return WIRES.find((wire) => wire === value);
}

/** From a producer, with an otherwise successful answer: the KV of the prompt will not come. ErrorData as JSON, URI-encoded. */
export const KV_FAILED_HEADER = 'x-pd-kv-failed';

/** Characters of the header; servers and clients accept 16 KiB of headers in all. */
const LONGEST_HEADER = 4_096;
/** Characters of a message or of one value of its context. */
const LONGEST_TEXT = 512;
const MOST_CAUSES = 4;

/** Without its causes, or reduced to its code, if it would be too long. */
export function writeKvFailed(error: ErrorData): string {
  const { code, message, context } = error;
  for (const part of [error, { code, message, context }, { code, message: '', context: {} }]) {
    const header = encodeURIComponent(JSON.stringify(shortened(part)));
    if (header.length <= LONGEST_HEADER) return header;
  }
  return '';
}

/** Undefined if it is absent or invalid. */
export function readKvFailed(value: unknown): ErrorData | undefined {
  if (typeof value !== 'string' || value.length > LONGEST_HEADER) return undefined;
  try {
    return readErrorData(JSON.parse(decodeURIComponent(value)));
  } catch {
    return undefined;
  }
}

/** An error reported by another instance; undefined if it is not one. */
export function readErrorData(value: unknown, most = MOST_CAUSES): ErrorData | undefined {
  if (typeof value !== 'object' || value === null) return undefined;
  const { code, message, context, cause } = value as Record<string, unknown>;
  if (typeof code !== 'string' || !Object.hasOwn(ERROR_TABLE, code) || typeof message !== 'string')
    return undefined;
  const inner = most > 0 ? readErrorData(cause, most - 1) : undefined;
  return shortened({
    code: code as ErrorCode,
    message,
    context: typeof context === 'object' && context !== null ? (context as ErrorContext) : {},
    ...(inner && { cause: inner }),
  });
}

function shortened({ code, message, context, cause }: ErrorData): ErrorData {
  const cut = (text: string) => text.slice(0, LONGEST_TEXT).replace(/\p{Surrogate}/gu, '\ufffd');
  const kept = Object.entries(context).flatMap(([key, value]): [string, string | number | boolean][] => {
    if (typeof value === 'string') return [[cut(key), cut(value)]];
    return typeof value === 'number' || typeof value === 'boolean' ? [[cut(key), value]] : [];
  });
  return {
    code,
    message: cut(message),
    context: Object.fromEntries(kept),
    ...(cause && { cause: shortened(cause) }),
  };
}
