/** Errors in the form that clients of an OpenAI server expect. */
import { maxHeaderSize, STATUS_CODES } from 'node:http';
import type { Socket } from 'node:net';
import type { ConnectionError } from 'fastify';
import { type ErrorCode, type ErrorData, PdError } from './errors.ts';

export interface OpenAiError {
  readonly error: {
    readonly message: string;
    readonly type: string;
    readonly param: string | null;
    readonly code: string;
    /** Beyond OpenAI's form, for server errors: peer, tensor and whatever else is known about the failure. */
    readonly context?: ErrorData['context'];
    /** Likewise: what caused it. The innermost cause shows which end to look at. */
    readonly cause?: ErrorData;
  };
}

/** Headers of an error response: when another try may succeed. */
export function retryHeaders({ status, context }: PdError): { readonly 'retry-after'?: string } {
  const { retryAfter } = context;
  if (status === 429) return { 'retry-after': typeof retryAfter === 'number' ? String(retryAfter) : '1' };
  return status === 503 ? { 'retry-after': '3' } : {};
}

const TYPES: Readonly<Record<number, string>> = {
  403: 'permission_error',
  429: 'rate_limit_error',
};

/** What clients of OpenAI look for by name has it in answers. */
const CODES: Partial<Record<ErrorCode, string>> = {
  MODEL_NOT_FOUND: 'model_not_found',
  CONTEXT_EXCEEDED: 'context_length_exceeded',
  KEY_REFUSED: 'invalid_api_key',
  OVERLOADED: 'rate_limit_exceeded',
};

/** A code as answers have it. */
export function codeInAnswers(code: ErrorCode): string {
  return CODES[code] ?? code;
}

/** MODEL_NOT_FOUND. */
export function modelNotFound(requested: string, served: readonly string[]): PdError {
  const name = JSON.stringify(requested.slice(0, 200));
  const text = `model ${name} is not served here; served: ${served.join(', ') || 'none'}`;
  return new PdError('MODEL_NOT_FOUND', text, { param: 'model' });
}

export function openAiError(error: PdError): OpenAiError {
  const { status, message } = error;
  const { context, cause } = error.toData();
  const type = TYPES[status] ?? (status < 500 ? 'invalid_request_error' : 'server_error');
  const param = typeof context['param'] === 'string' ? context['param'] : null;
  const fields = { message, type, param, code: codeInAnswers(error.code) };
  return { error: status < 500 ? fields : { ...fields, context, ...(cause && { cause }) } };
}

/** Answers what never became a request, and ends its connection. To be a server's `clientErrorHandler`. */
export function refuseUnparsed({ code, message }: ConnectionError, socket: Socket): void {
  // What is written before there is TLS would wait for it, and the connection with it.
  if (!socket.writable || code === 'ECONNRESET' || code === 'ERR_TLS_HANDSHAKE_TIMEOUT') {
    socket.destroy();
    return;
  }
  let [status, why] = [400, `what came is no HTTP: ${message}`];
  if (code === 'HPE_HEADER_OVERFLOW') {
    [status, why] = [431, `its headers have more than ${maxHeaderSize} bytes`];
  } else if (code === 'ERR_HTTP_REQUEST_TIMEOUT') [status, why] = [408, 'it did not come to its end in time'];
  const body = JSON.stringify(
    openAiError(new PdError('REQUEST_INVALID', `the request cannot be read: ${why}`)),
  );
  const head = [
    `HTTP/1.1 ${status} ${STATUS_CODES[status]}`,
    'content-type: application/json; charset=utf-8',
    `content-length: ${Buffer.byteLength(body)}`,
    'connection: close',
  ];
  socket.end(`${head.join('\r\n')}\r\n\r\n${body}`, () => socket.destroy());
}

/** One server-sent event. */
export interface StreamEvent {
  readonly name?: string;
  readonly data: object;
  /** Written in turns: what is said of a prompt may be long, what is said of a token is not. */
  readonly long?: boolean;
}

/**
 * How a stream of the Responses API ends that fails. `sequence`: the number of its next event. `response`: as it stood; where that is not
 * known nothing can be said of it.
 */
export function failedResponse(
  { message, code, param }: Pick<OpenAiError['error'], 'message' | 'code' | 'param'>,
  sequence: number,
  response?: object,
): readonly StreamEvent[] {
  const events: StreamEvent[] = [];
  const add = (type: string, data: object) =>
    events.push({
      name: type,
      data: { type, sequence_number: sequence + events.length, ...data },
      long: events.length > 0,
    });
  add('error', { code, message, param });
  if (!response) return events;
  // Clients know this code; our own stands in the event before.
  const error = { code: 'server_error', message };
  add('response.failed', { response: { ...response, completed_at: null, status: 'failed', error } });
  return events;
}

/** As it goes out; `data` in one line, as JSON is. */
export function eventText(data: string, name?: string): string {
  return `${name === undefined ? '' : `event: ${name}\n`}data: ${data}\n\n`;
}
