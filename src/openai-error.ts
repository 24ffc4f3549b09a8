/** Errors as clients of an OpenAI server read them. */
import type { PdError } from './errors.ts';

export interface OpenAiError {
  readonly error: {
    readonly message: string;
    readonly type: string;
    readonly param: string | null;
    readonly code: string;
  };
}

export function openAiError(error: PdError): OpenAiError {
  const { status, code, message } = error;
  const type = status === 404 ? 'not_found_error' : status < 500 ? 'invalid_request_error' : 'server_error';
  const param = error.context['param'];
  return { error: { message, type, param: typeof param === 'string' ? param : null, code } };
}
