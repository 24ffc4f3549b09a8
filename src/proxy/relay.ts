/** Answers on their way to the client: an instance's events one by one as they come, anything else whole; and the proxy's own errors. */
import type { ServerResponse } from 'node:http';
import type { Signal } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { HOP_HEADERS } from '../net/hop-headers.ts';
import { reasonOf } from '../net/resolve.ts';
import { openAiError, retryHeaders } from '../openai-error.ts';
import { receiptIdOf } from './receipts.ts';
import { instanceLabel } from './registry.ts';
import type { StreamEnd } from './stream-end.ts';
import {
  type Call,
  InstanceRefused,
  joined,
  readWhole,
  timeoutError,
  type UpstreamResponse,
  type WholeAnswer,
} from './upstream.ts';

export interface RelayOptions {
  /** Its timeout bounds the time without progress: for the next chunk to come, or for the client to take the one that waits. */
  readonly call: Call;
  readonly requestId: string;
  /** Aborted once the client has gone or the proxy stops. */
  readonly signal: Signal;
  readonly onFirstEvent: () => void;
  /** Of the stream that the client gets. */
  readonly end: StreamEnd;
}

/** An answer that is not a stream is held until it is whole, so that an instance that dies midway is a 502; a longer one flows. Bytes. */
const MAX_HELD_ANSWER = 16 * 1024 * 1024;
/** An unfinished event longer than this is passed on in parts. Bytes. */
const MAX_HELD_EVENT = 64 * 1024;

const CR = 0x0d;
const LF = 0x0a;

const BROKE_OFF = 'its answer broke off before a byte of it was passed on';

/** Never passed on: they belong to one connection, or are set by the proxy itself. */
const OWN_HEADERS = new Set([...HOP_HEADERS, 'content-length', 'date', 'x-request-id', 'x-pd-request-id']);

/** By which its client finds it in logs, and asks for its receipt (route.ts). */
function idHeaders(requestId: string): Record<string, string> {
  return { 'x-request-id': requestId, 'x-pd-request-id': receiptIdOf(requestId) };
}

export function isEventStream(response: UpstreamResponse): boolean {
  return String(response.headers['content-type'] ?? '').startsWith('text/event-stream');
}

/**
 * Writes the whole answer. Throws where it breaks off: where the client has nothing yet, its answer is the caller's; a stream has ended with
 * an error event.
 */
export async function relay(
  response: UpstreamResponse,
  out: ServerResponse,
  options: RelayOptions,
): Promise<void> {
  if (out.headersSent && !isEventStream(response)) {
    answerWhole(await readWhole(response, MAX_HELD_ANSWER), out, options);
    return;
  }
  const events = isEventStream(response) ? new SseEvents() : undefined;
  const writeHead = (extra: Record<string, string | number> = {}) =>
    out.writeHead(response.statusCode, { ...answerHeaders(response, options.requestId), ...extra });
  const watch = new ProgressWatch(response, out, options.call);
  const drained = () => {
    watch.progress();
    response.resume();
  };
  let held: Buffer[] = [];
  let heldBytes = 0;
  let started = false;
  /** The head is on its way, so that chunks may go to the connection themselves. */
  let headGone = false;
  try {
    if (events && !out.headersSent) {
      writeHead();
      headGone = !response.begun;
      if (headGone) out.flushHeaders();
    }
    await response.read((chunk) => {
      watch.progress();
      let bytes = chunk;
      if (events) {
        if (!started) options.onFirstEvent();
        started = true;
        bytes = events.push(chunk);
        options.end.passed(bytes);
      } else if (!out.headersSent) {
        held.push(chunk);
        heldBytes += chunk.length;
        if (heldBytes <= MAX_HELD_ANSWER) return true;
        writeHead();
        bytes = joined(held);
        held = [];
      }
      if (bytes.length === 0) return true;
      // Node 24 holds back what was written to the answer in this turn, the first chunk with its head; nothing may overtake it.
      const straight = headGone && out.chunkedEncoding && out.writableCorked === 0;
      const socket = straight ? out.socket : undefined;
      headGone = true;
      if (socket ? socket.write(chunkOf(bytes)) : out.write(bytes)) return true;
      (socket ?? out).once('drain', drained);
      return false;
    });
    if (!out.headersSent) writeHead({ 'content-length': heldBytes });
    endWith(out, events ? events.rest() : joined(held));
  } catch (cause) {
    response.destroy();
    const error = failureOf(cause, watch, options);
    // The client may have the head of a stream by then, which will do for another pair's.
    if (!(events ? started : out.headersSent) && error.code === 'UPSTREAM_FAILED') {
      throw new InstanceRefused(options.call, BROKE_OFF, cause);
    }
    if (!out.headersSent || out.destroyed) throw error;
    if (events) out.end(options.end.failed(error));
    else out.destroy(); // the rest of the length, or the last chunk, is missing: the client notices
    throw error;
  } finally {
    watch.stop();
  }
}

/**
 * As it stands on the connection: its size in hexadecimal, and line breaks. Through the answer it would be written in four pieces, which
 * takes a third of the time of a relayed event.
 */
function chunkOf(bytes: Buffer): Buffer {
  const size = bytes.length.toString(16);
  const chunk = Buffer.allocUnsafe(bytes.length + size.length + 4);
  chunk.write(size, 'latin1');
  chunk[size.length] = CR;
  chunk[size.length + 1] = LF;
  chunk.set(bytes, size.length + 2);
  chunk[chunk.length - 2] = CR;
  chunk[chunk.length - 1] = LF;
  return chunk;
}

function failureOf(cause: unknown, watch: ProgressWatch, options: RelayOptions): PdError {
  if (watch.expired) return watch.expired;
  const { signal } = options;
  const { instance, what } = options.call;
  if (signal.aborted) return PdError.from(signal.reason, 'REQUEST_ABORTED');
  return new PdError(
    'UPSTREAM_FAILED',
    `${what}: ${instance.role} ${instanceLabel(instance)} broke off in the middle of its answer: ${reasonOf(cause)}`,
    { peer: instance.httpAddress },
    { cause },
  );
}

/** Ends the relay when nothing has moved for too long, on either side. */
class ProgressWatch {
  /** Set once it has ended the relay. */
  expired: PdError | undefined;
  readonly #timer: NodeJS.Timeout;

  constructor(response: UpstreamResponse, out: ServerResponse, call: Call) {
    const { what, timeoutMs } = call;
    this.#timer = setTimeout(() => {
      if (out.writableNeedDrain || out.socket?.writableNeedDrain) {
        this.expired = new PdError('REQUEST_ABORTED', `${what}: the client took nothing for ${timeoutMs} ms`);
        out.destroy();
      } else {
        this.expired = timeoutError(call);
      }
      response.destroy(this.expired);
    }, timeoutMs);
  }

  progress(): void {
    this.#timer.refresh();
  }

  stop(): void {
    clearTimeout(this.#timer);
  }
}

/**
 * Server-sent events, as far as a relay must know them: whole events pass, the start of an unfinished one is held, so that a stream that
 * breaks off can still end with an event of ours. Servers write an event at a time, so in practice nothing waits; a reader could not use
 * half an event anyway.
 */
export class SseEvents {
  #held: Buffer = Buffer.alloc(0);

  /** What may go out now. */
  push(chunk: Buffer): Buffer {
    // As servers write them.
    if (this.#held.length === 0 && chunk.at(-1) === LF && chunk.at(-2) === LF) return chunk;
    const bytes = this.#held.length > 0 ? Buffer.concat([this.#held, chunk]) : chunk;
    const end = Math.max(endAfter(bytes, '\n\n'), endAfter(bytes, '\r\n\r\n'));
    const out = bytes.length - end > MAX_HELD_EVENT ? bytes.length : end;
    this.#held = bytes.subarray(out);
    return bytes.subarray(0, out);
  }

  /** What the stream ended on; empty for a well-formed one. */
  rest(): Buffer {
    return this.#held;
  }
}

function endAfter(bytes: Buffer, separator: string): number {
  const at = bytes.lastIndexOf(separator, undefined, 'latin1');
  return at < 0 ? 0 : at + separator.length;
}

/** An instance's answer that has been read to its end. */
export function answerWhole(
  { response, body }: WholeAnswer,
  out: ServerResponse,
  { requestId, end }: Pick<RelayOptions, 'requestId' | 'end'>,
): void {
  if (out.headersSent) {
    // Those of a stream, of a pair that broke off before its first event.
    out.end(end.refused(body));
    return;
  }
  out.writeHead(response.statusCode, {
    ...answerHeaders(response, requestId),
    'content-length': body.length,
  });
  endWith(out, body);
}

/** Of a short body: then it goes out with the head as one text, which is quicker than two pieces. */
const SHORT_BODY = 16_384;

function endWith(out: ServerResponse, body: Buffer): void {
  if (body.length > SHORT_BODY) out.end(body);
  else out.end(body.toString('latin1'), 'latin1');
}

/**
 * An error of the proxy's own, in OpenAI's form, where nothing has been sent yet but perhaps the head of a stream. `requestId`: of its last
 * attempt, or of its receipt where it did not come to one.
 */
export function answerError(
  out: ServerResponse,
  error: PdError,
  about: Partial<Pick<RelayOptions, 'requestId'>> & Pick<RelayOptions, 'end'>,
): void {
  const { requestId, end } = about;
  if (out.writableEnded || out.destroyed) return;
  if (out.headersSent) {
    out.end(end.failed(error));
    return;
  }
  const body = JSON.stringify(openAiError(error));
  out.writeHead(error.status, {
    'content-type': 'application/json',
    'content-length': Buffer.byteLength(body),
    ...(requestId !== undefined && idHeaders(requestId)),
    ...retryHeaders(error),
  });
  out.end(body);
}

/** The headers of an instance's answer as the client gets them. */
function answerHeaders(response: UpstreamResponse, requestId: string): Record<string, string | string[]> {
  const headers: Record<string, string | string[]> = idHeaders(requestId);
  for (const [name, value] of Object.entries(response.headers)) {
    if (value !== undefined && !OWN_HEADERS.has(name)) headers[name] = value;
  }
  return headers;
}
