/**
 * OpenTelemetry traces over OTLP/HTTP as JSON. Loaded only where an endpoint is given. Spans are made of a request after its end, from what
 * is remembered of it anyway; while it runs, all that tracing costs is the ids that travel with it.
 *
 *   begin(headers) --> ids, for `traceparent` --> the request runs --> add(spans) --> queue --> a POST a second, one at a time
 *                                                                        |                       |
 *                                                                        +- full: dropped        +- no answer in time, or an error: failed
 */
import { randomBytes } from 'node:crypto';
import { type IncomingHttpHeaders, Agent as PlainAgent, request as requestPlainly } from 'node:http';
import { request as requestSecurely, Agent as SecureAgent } from 'node:https';
import { hostname } from 'node:os';
import { within } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { packageVersion } from '../version.ts';
import { type Logger, RateLimitedLog } from './log.ts';
import { monotonicMs } from './timelines.ts';

/** Where a request stands in its trace. Plain data. */
export interface TraceContext {
  /** 32 hexadecimal digits. */
  readonly traceId: string;
  /** Of whoever sent the request, 16 hexadecimal digits; absent: the trace begins here. */
  readonly parentId: string | undefined;
  /** Of its span here. */
  readonly spanId: string;
  /** Of others, passed on as it came. */
  readonly state: string | undefined;
}

type AttributeValue = string | number | boolean | readonly string[] | undefined;

export interface Span {
  readonly id: string;
  /** Absent: the trace begins with it. */
  readonly parentId: string | undefined;
  readonly name: string;
  readonly kind: 'internal' | 'server' | 'client';
  /** `monotonicMs`. */
  readonly from: number;
  readonly to: number;
  /** Undefined ones are left out. */
  readonly attributes?: Readonly<Record<string, AttributeValue>> | undefined;
  /** What went wrong. */
  readonly error?: string | undefined;
}

/** A span that begins and ends within its parent. */
export type InnerSpan = Omit<Span, 'id' | 'parentId' | 'kind'>;

export type SpanResult = 'exported' | 'failed' | 'dropped';

export interface TracingOptions {
  /** Base URL of the receiver; spans go to its /v1/traces. */
  readonly endpoint: string;
  /** `service.name`, where OTEL_SERVICE_NAME says no other. */
  readonly service: string;
  /** Of this process, beside those. */
  readonly resource?: Readonly<Record<string, AttributeValue>>;
  readonly log: Logger;
  readonly count: (result: SpanResult, spans: number) => void;
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** Overrides, for tests. */
  readonly intervalMs?: number;
  readonly postMs?: number;
}

/** Spans that wait. */
const MOST_QUEUED = 8_192;
/** Spans of a POST. */
const MOST_POSTED = 1_024;
const INTERVAL_MS = 1_000;
/** For a POST, to the end of its answer. */
const POST_MS = 10_000;
/** For what is left when the program ends. */
const CLOSE_MS = 2_000;

const KINDS = { internal: 1, server: 2, client: 3 } as const;
const ERROR_STATUS = 2;
const SAMPLED = 1;

/** Close it. */
export class Tracing {
  readonly #options: TracingOptions;
  readonly #url: URL;
  readonly #headers: Readonly<Record<string, string>>;
  readonly #resource: object;
  readonly #agent: PlainAgent | SecureAgent;
  readonly #limited = new RateLimitedLog(60_000);
  /** As they are sent. */
  #queue: object[] = [];
  #timer: NodeJS.Timeout | undefined;
  #posting: Promise<void> | undefined;
  readonly #closing = new AbortController();

  constructor(options: TracingOptions) {
    const { endpoint, service, resource, env = process.env } = options;
    this.#options = options;
    this.#url = tracesUrl(endpoint);
    this.#headers = listed(env['OTEL_EXPORTER_OTLP_HEADERS']);
    this.#resource = {
      attributes: attributesOf({
        ...listed(env['OTEL_RESOURCE_ATTRIBUTES']),
        'service.name': env['OTEL_SERVICE_NAME'] || service,
        'service.version': packageVersion(),
        'host.name': hostname(),
        'process.pid': process.pid,
        ...resource,
      }),
    };
    const Agent = this.#url.protocol === 'https:' ? SecureAgent : PlainAgent;
    this.#agent = new Agent({ keepAlive: true, maxSockets: 1 });
  }

  /** Undefined where the caller has its own trace, and does not record it. */
  begin({ traceparent, tracestate }: IncomingHttpHeaders): TraceContext | undefined {
    const given = parseTraceparent(traceparent);
    if (given && !given.sampled) return undefined;
    return {
      traceId: given?.traceId ?? newTraceId(),
      parentId: given?.parentId,
      spanId: newSpanId(),
      state: given && typeof tracestate === 'string' ? tracestate : undefined,
    };
  }

  /** Of one trace. Returns at once. */
  add({ traceId, state }: TraceContext, spans: readonly Span[]): void {
    const { count, intervalMs = INTERVAL_MS } = this.#options;
    const room = MOST_QUEUED - this.#queue.length;
    if (room < spans.length) {
      count('dropped', spans.length);
      return;
    }
    // The two clocks part only where somebody sets one of them.
    const epoch = performance.timeOrigin + performance.now() - monotonicMs();
    for (const span of spans) this.#queue.push(encoded(span, traceId, state, epoch));
    this.#timer ??= setTimeout(() => this.#flush(), intervalMs).unref();
  }

  /** Sends what waits, if that can be done soon. */
  async close(): Promise<void> {
    clearTimeout(this.#timer);
    const late = setTimeout(() => this.#closing.abort(new Error('the program ends')), CLOSE_MS);
    await this.#posting;
    while (this.#queue.length > 0 && !this.#closing.signal.aborted) await this.#post();
    clearTimeout(late);
    const { count, log } = this.#options;
    const left = this.#queue.splice(0).length;
    if (left > 0) {
      count('dropped', left);
      log.warn(`${left} spans were not sent to ${this.#url.origin} before the end`);
    }
    this.#agent.destroy();
  }

  #flush(): void {
    this.#posting ??= this.#post().finally(() => {
      this.#posting = undefined;
      this.#timer = undefined;
      if (this.#queue.length === 0 || this.#closing.signal.aborted) return;
      const { intervalMs = INTERVAL_MS } = this.#options;
      const full = this.#queue.length >= MOST_POSTED;
      this.#timer = setTimeout(() => this.#flush(), full ? 0 : intervalMs).unref();
    });
  }

  /** Never rejects. */
  async #post(): Promise<void> {
    const { count, log } = this.#options;
    const spans = this.#queue.splice(0, MOST_POSTED);
    const scope = { name: 'pd-worker', version: packageVersion() };
    const body = JSON.stringify({
      resourceSpans: [{ resource: this.#resource, scopeSpans: [{ scope, spans }] }],
    });
    try {
      const status = await this.#send(body);
      if (status < 200 || status > 299) throw new Error(`it answers ${status}`);
      count('exported', spans.length);
    } catch (error) {
      count('failed', spans.length);
      this.#limited.log('failed', (suppressed) =>
        log.warn({ suppressed }, `traces did not get to ${this.#url.origin}: ${PdError.from(error).message}`),
      );
    }
  }

  /** Resolves with the status, after the end of the answer. */
  #send(body: string): Promise<number> {
    const { postMs = POST_MS } = this.#options;
    const bytes = Buffer.from(body);
    const signal = within(postMs, this.#closing.signal);
    return new Promise((resolve, reject) => {
      const failed = (error = new Error('the connection broke')) =>
        reject(signal.aborted ? signal.reason : error);
      const open = this.#url.protocol === 'https:' ? requestSecurely : requestPlainly;
      const headers = {
        'content-type': 'application/json',
        'content-length': bytes.length,
        ...this.#headers,
      };
      const sent = open(this.#url, { method: 'POST', agent: this.#agent, signal, headers }, (answer) => {
        answer.once('error', failed);
        answer.once('end', () => resolve(answer.statusCode ?? 0));
        // Of no interest, and perhaps long.
        answer.resume();
      });
      sent.once('error', failed).once('close', failed);
      sent.end(bytes);
    });
  }
}

/** `traceparent` for what is asked of others under the span `spanId`. */
export function traceparentOf({ traceId }: TraceContext, spanId: string): string {
  return `00-${traceId}-${spanId}-01`;
}

export function newSpanId(): string {
  return randomBytes(8).toString('hex');
}

function newTraceId(): string {
  return randomBytes(16).toString('hex');
}

const TRACEPARENT = /^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?$/;

/** https://www.w3.org/TR/trace-context/. Undefined: it is none, so that a new trace begins. */
export function parseTraceparent(header: string | string[] | undefined) {
  const match = typeof header === 'string' ? TRACEPARENT.exec(header.trim()) : null;
  if (!match) return undefined;
  const [, version, traceId, parentId, flags, more] = match;
  if (version === 'ff' || (version === '00' && more !== undefined)) return undefined;
  if (/^0+$/.test(traceId!) || /^0+$/.test(parentId!)) return undefined;
  return { traceId: traceId!, parentId: parentId!, sampled: (Number.parseInt(flags!, 16) & SAMPLED) !== 0 };
}

/** The base may end on the path of traces itself. */
function tracesUrl(endpoint: string): URL {
  const url = new URL(endpoint);
  const path = url.pathname.replace(/\/+$/, '');
  url.pathname = path.endsWith('/v1/traces') ? path : `${path}/v1/traces`;
  return url;
}

/** `key=value,key=value`, with percent signs, as OpenTelemetry's variables have it. */
function listed(text: string | undefined): Record<string, string> {
  const pairs = (text ?? '').split(',').flatMap((pair) => {
    const at = pair.indexOf('=');
    return at > 0 ? [[pair.slice(0, at).trim(), unescaped(pair.slice(at + 1).trim())] as const] : [];
  });
  return Object.fromEntries(pairs);
}

function unescaped(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function encoded(span: Span, traceId: string, state: string | undefined, epoch: number): object {
  const { id, parentId, name, kind, from, to, attributes = {}, error } = span;
  return {
    traceId,
    spanId: id,
    ...(parentId !== undefined && { parentSpanId: parentId }),
    ...(state !== undefined && { traceState: state }),
    flags: SAMPLED,
    name,
    kind: KINDS[kind],
    startTimeUnixNano: nanoseconds(from + epoch),
    endTimeUnixNano: nanoseconds(Math.max(from, to) + epoch),
    attributes: attributesOf(attributes),
    ...(error !== undefined && { status: { code: ERROR_STATUS, message: error } }),
  };
}

/** Of milliseconds, to the microsecond: a double has no more. */
function nanoseconds(ms: number): string {
  return `${Math.round(ms * 1_000)}000`;
}

function attributesOf(attributes: Readonly<Record<string, AttributeValue>>): object[] {
  return Object.entries(attributes).flatMap(([key, value]) =>
    value === undefined ? [] : [{ key, value: encodedValue(value) }],
  );
}

function encodedValue(value: Exclude<AttributeValue, undefined>): object {
  if (typeof value === 'string') return { stringValue: value };
  if (typeof value === 'boolean') return { boolValue: value };
  if (typeof value === 'number')
    return Number.isSafeInteger(value) ? { intValue: String(value) } : { doubleValue: value };
  return { arrayValue: { values: value.map((one) => ({ stringValue: one })) } };
}
