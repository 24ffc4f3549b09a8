/** The consumer's answer on its way to the client: events at once and one by one, anything else whole. */
import { once } from 'node:events';
import type { ServerResponse } from 'node:http';
import { PdError } from '../errors.ts';
import { reasonOf } from '../net/resolve.ts';
import { type Instance, instanceLabel } from './registry.ts';
import { errorEvents, SseEvents } from './sse.ts';
import { answerHeaders, timeoutError, type UpstreamResponse } from './upstream.ts';

export interface RelayOptions {
  readonly instance: Instance;
  readonly what: string;
  readonly requestId: string;
  /** Most time without progress: until the next chunk comes, or the client takes the one that waits. */
  readonly idleMs: number;
  readonly timeoutName: string;
  /** Aborted once the client has gone or the proxy stops. */
  readonly signal: AbortSignal;
  readonly onFirstEvent: () => void;
}

/** An answer that is no stream is held until it is whole, so that an instance that dies midway is a 502; beyond this it flows. Bytes. */
const MAX_HELD_ANSWER = 16 * 1024 * 1024;

export function isEventStream(response: UpstreamResponse): boolean {
  return String(response.headers['content-type'] ?? '').startsWith('text/event-stream');
}

/** Writes the whole answer. Throws only while nothing has been sent; a stream that breaks off later ends with an error event. */
export async function relay(
  response: UpstreamResponse,
  out: ServerResponse,
  options: RelayOptions,
): Promise<void> {
  const events = isEventStream(response) ? new SseEvents() : undefined;
  const writeHead = (extra: Record<string, string | number> = {}) =>
    out.writeHead(response.statusCode, {
      ...answerHeaders(response),
      'x-request-id': options.requestId,
      ...extra,
    });
  const watch = new ProgressWatch(response, out, options);
  let held: Buffer[] = [];
  let heldBytes = 0;
  let started = false;
  try {
    if (events) {
      writeHead();
      out.flushHeaders();
    }
    for await (const chunk of response.body as AsyncIterable<Buffer>) {
      watch.progress();
      if (events) {
        if (!started) options.onFirstEvent();
        started = true;
        await write(out, events.push(chunk), options.signal);
      } else if (out.headersSent) {
        await write(out, chunk, options.signal);
      } else {
        held.push(chunk);
        heldBytes += chunk.length;
        if (heldBytes <= MAX_HELD_ANSWER) continue;
        writeHead();
        for (const part of held) await write(out, part, options.signal);
        held = [];
      }
      watch.progress();
    }
    if (!out.headersSent) writeHead({ 'content-length': heldBytes });
    out.end(events ? events.rest() : Buffer.concat(held));
  } catch (cause) {
    response.body.destroy();
    const error = failureOf(cause, watch, options);
    if (!out.headersSent || out.destroyed) throw error;
    if (events) out.end(errorEvents(error));
    else out.destroy(); // a length or a terminating chunk is missing: the client notices
    throw error;
  } finally {
    watch.stop();
  }
}

function failureOf(cause: unknown, watch: ProgressWatch, options: RelayOptions): PdError {
  if (watch.expired) return watch.expired;
  const { instance, what, signal } = options;
  if (signal.aborted) return PdError.from(signal.reason, 'REQUEST_ABORTED');
  return new PdError(
    'UPSTREAM_FAILED',
    `${what}: ${instance.role} ${instanceLabel(instance)} broke off in the middle of its answer: ${reasonOf(cause)}`,
    { peer: instance.httpAddress },
    { cause },
  );
}

/** Waits while the client's buffer is full. */
async function write(out: ServerResponse, bytes: Buffer, signal: AbortSignal): Promise<void> {
  if (bytes.length === 0 || out.write(bytes)) return;
  await once(out, 'drain', { signal });
}

/** Ends the transfer when nothing has moved for too long, on whichever side. */
class ProgressWatch {
  /** Set once it has ended the transfer. */
  expired: PdError | undefined;
  readonly #timer: NodeJS.Timeout;

  constructor(response: UpstreamResponse, out: ServerResponse, options: RelayOptions) {
    const { instance, what, idleMs, timeoutName } = options;
    this.#timer = setTimeout(() => {
      if (out.writableNeedDrain) {
        this.expired = new PdError('REQUEST_ABORTED', `${what}: the client took nothing for ${idleMs} ms`);
        out.destroy();
      } else {
        this.expired = timeoutError(instance, what, idleMs, timeoutName);
      }
      response.body.destroy(this.expired);
    }, idleMs);
  }

  progress(): void {
    this.#timer.refresh();
  }

  stop(): void {
    clearTimeout(this.#timer);
  }
}
