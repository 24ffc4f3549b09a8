/**
 * Errors of the native side. `ffi/` imports nothing of `src/`, so it knows the codes it throws but not the class: src/errors.ts, which
 * every module of `src/` that throws or catches imports, registers its own. Without it (ffi/ alone) they are plain Errors with a code.
 */

export type NativeErrorCode =
  | 'LIBRARY_NOT_FOUND'
  | 'LIBRARY_TOO_OLD'
  | 'OUT_OF_DEVICE_MEMORY'
  | 'CUDA_ERROR'
  | 'NCCL_ERROR'
  | 'PEER_LOST'
  | 'SYSTEM_CALL_FAILED'
  | 'MESSAGE_INVALID';

type NativeErrorContext = Readonly<Record<string, string | number | undefined>>;

type MakeError = (
  code: NativeErrorCode,
  message: string,
  context: NativeErrorContext,
  options?: { readonly cause: unknown },
) => Error;

let make: MakeError = (code, message, context, options) =>
  Object.assign(new Error(message, options), { code, context });

/** `factory` creates every error of `ffi/` from now on, in this thread. */
export function makeNativeErrorsBy(factory: MakeError): void {
  make = factory;
}

export function nativeError(
  code: NativeErrorCode,
  message: string,
  context: NativeErrorContext = {},
  options?: { readonly cause: unknown },
): Error {
  return make(code, message, context, options);
}

/** What a call was for; becomes the beginning of the message. */
export interface CallContext {
  readonly what?: string;
  readonly [key: string]: string | number | undefined;
}

/** A status code of a library, with the library's own text. */
export function statusError(
  code: NativeErrorCode,
  call: string,
  status: number,
  text: string,
  context: CallContext = {},
): Error {
  const { what, ...rest } = context;
  const message = `${what === undefined ? '' : `${what}: `}${call} failed with ${status}: ${text}`;
  return make(code, message, { call, status, ...rest });
}
