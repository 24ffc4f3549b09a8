/** Status codes of the native libraries as errors with the library's own text. */
import { type ErrorCode, PdError } from '../src/errors.ts';

/** What a call was for; becomes the beginning of the message. */
export interface CallContext {
  readonly what?: string;
  readonly [key: string]: string | number | undefined;
}

export function statusError(
  code: ErrorCode,
  call: string,
  status: number,
  text: string,
  context: CallContext = {},
): PdError {
  const { what, ...rest } = context;
  const message = `${what === undefined ? '' : `${what}: `}${call} failed with ${status}: ${text}`;
  return new PdError(code, message, { call, status, ...rest });
}
