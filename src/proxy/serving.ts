/**
 * A process that relays: its HTTP server with OpenAI's routes, what all their requests share, and a client's request from its arrival to
 * its answer. It goes to a pair, and to others where an instance does not take it; what happens with one pair is in attempt.ts.
 */
import { hash } from 'node:crypto';
import { EventEmitter, once } from 'node:events';
import type { IncomingHttpHeaders, ServerResponse } from 'node:http';
import fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify';
import { Guard } from '../access/guard.ts';
import type { ProxyConfig } from '../config/proxy-config.ts';
import { Cancellation } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { onClientGone } from '../net/client-gone.ts';
import { NO_JSON_SCHEMAS } from '../net/json-schemas.ts';
import { keepReading } from '../net/keep-reading.ts';
import { askedPath, checkHeads, noSuchPath, unreadablePath } from '../net/request-head.ts';
import { limitUnread } from '../net/unread.ts';
import type { Logger } from '../observability/log.ts';
import { monotonicMs } from '../observability/timelines.ts';
import { openAiError, refuseUnparsed } from '../openai-error.ts';
import { Attempt, type ClientRequest, type ProxyContext } from './attempt.ts';
import { BodyReader, type BodyReaderOptions, type RequestBody } from './body.ts';
import type { Coordinator, Visit, Wish } from './coordinator.ts';
import type { ProxyMetrics } from './metrics.ts';
import { type Receipt, Receipts } from './receipts.ts';
import { instanceLabel } from './registry.ts';
import { answerError } from './relay.ts';
import type { RequestTraces } from './request-trace.ts';
import { type StreamEnd, streamEnd } from './stream-end.ts';
import { UI_EVENTS_ROUTE, UI_PAGE_ROUTES } from './ui.ts';
import { InstanceRefused, Upstream } from './upstream.ts';

const ROUTES = ['/v1/completions', '/v1/chat/completions', '/v1/responses'] as const;
/** A prompt of a million token ids fits. */
const BODY_LIMIT = 32 * 1024 * 1024;
/** For a client to send its whole request. */
const REQUEST_TIMEOUT_MS = 120_000;
/** For the last bytes of answers to leave. */
const CLOSE_MS = 2_000;
/** Classes on either side of 0; a priority beyond them counts as the last. */
const MOST_PRIORITY = 100;
/** nginx's number for a client that went away; only in logs and metrics. */
const CLIENT_GONE = 499;

/** What a request is refused by without its body: its method, the length of that, its encoding. */
const UNREAD = new Set([405, 413, 415]);

/** With keys, these take one that says `admin`. */
const ADMIN_ROUTES = new Set(['/admin/drain', '/debug/state', UI_EVENTS_ROUTE]);

export type OpenBodies = (log: Logger, options: BodyReaderOptions) => Pick<BodyReader, 'read' | 'close'>;

export interface ServingParts {
  readonly config: ProxyConfig;
  readonly log: Logger;
  readonly metrics: ProxyMetrics;
  readonly coordinator: Coordinator;
  /** By which a request is known that comes back; of all processes of a proxy the same. */
  readonly pseudonym: string;
  /** Only this proxy's own processes connect, which say whose the request is, and read bodies themselves. */
  readonly behindRelays?: boolean;
  readonly openBodies?: OpenBodies | undefined;
  /** Answers where there is no route. Absent: that there is none. */
  readonly elsewhere?: (request: FastifyRequest, reply: FastifyReply) => void;
}

/** Whoever made it adds routes of its own, opens its traces, has it listen, drains and closes it. */
export class Serving implements ProxyContext {
  readonly config: ProxyConfig;
  readonly log: Logger;
  readonly metrics: ProxyMetrics;
  readonly coordinator: Coordinator;
  readonly guard: Guard;
  readonly upstream: Upstream;
  readonly receipts = new Receipts();
  readonly bodies: Pick<BodyReader, 'read' | 'close'>;
  readonly app: FastifyInstance;
  traces: RequestTraces | undefined;
  readonly #pseudonym: string;
  readonly #running = new Set<ProxiedRequest>();
  /** `idle`: no request is under way any more. */
  readonly #events = new EventEmitter<{ idle: [] }>();
  #draining = false;

  /** Throws CONFIG_INVALID. */
  constructor(parts: ServingParts) {
    const { config, log, metrics, behindRelays = false } = parts;
    const { openBodies = (log, options) => new BodyReader(log, options) } = parts;
    this.config = config;
    this.log = log;
    this.metrics = metrics;
    this.coordinator = parts.coordinator;
    this.#pseudonym = parts.pseudonym;
    this.guard = new Guard({
      config: config.access,
      log,
      admin: ADMIN_ROUTES,
      open: new Set<string>(UI_PAGE_ROUTES),
      onRefused: (reason) => metrics.keysRefused.inc({ reason }),
    });
    this.upstream = new Upstream(config.upstream ?? {}, this.guard.keyed, log);
    this.bodies = openBodies(log, {
      tokenizer: behindRelays ? undefined : config.tokenizer,
      onTokenized: (result) => metrics.tokenized.inc({ result }),
    });
    this.app = fastify({
      https: behindRelays ? null : this.guard.https,
      bodyLimit: BODY_LIMIT,
      requestTimeout: REQUEST_TIMEOUT_MS,
      forceCloseConnections: 'idle',
      logger: false,
      schemaController: NO_JSON_SCHEMAS,
      frameworkErrors: (_cause, request, reply: FastifyReply) =>
        reply.code(400).send(openAiError(unreadablePath(request))),
      clientErrorHandler: refuseUnparsed,
      trustProxy: behindRelays,
    }) as unknown as FastifyInstance;
    this.guard.attach(this.app);
    checkHeads(this.app);
    limitUnread(this.app, config.decodeIdleTimeoutMs);
    this.#routes(parts.elsewhere);
  }

  /** Has traces made of its requests, where they are asked for. */
  async openTraces(): Promise<void> {
    if (this.config.otlpEndpoint === undefined) return;
    const { RequestTraces } = await import('./request-trace.ts');
    this.traces = RequestTraces.open(this.config, this.metrics, this.log);
  }

  /** Requests under way. */
  get running(): number {
    return this.#running.size;
  }

  /** It takes no new requests. */
  get draining(): boolean {
    return this.#draining;
  }

  /** Takes no new requests, and resolves once those under way have ended: within `ms`, as then the rest is broken off. */
  async drain(ms: number): Promise<void> {
    this.#draining = true;
    if (ms === 0) this.break();
    if (this.#running.size === 0) return;
    const timer = setTimeout(() => this.break(), ms);
    await once(this.#events, 'idle');
    clearTimeout(timer);
  }

  /** Breaks off what is under way. */
  break(): void {
    void this.bodies.close(); // who waits for it is to hear that the proxy stops
    const reason = new PdError('SERVER_DRAINING', 'the proxy is stopping');
    for (const request of this.#running) request.signal.abort(reason);
  }

  /** After `drain`. */
  async close(): Promise<void> {
    // Idle connections are closed; answers still on their way are not cut.
    const timer = setTimeout(() => this.app.server.closeAllConnections(), CLOSE_MS);
    await this.app.close();
    clearTimeout(timer);
    await this.traces?.close();
    this.guard.close();
    await Promise.all([this.upstream.close(), this.bodies.close()]);
  }

  /** What `via` says from here on. Throws REQUEST_INVALID for a request that has been here: it would come again and again. */
  via({ via }: IncomingHttpHeaders): string {
    const own = `1.1 ${this.#pseudonym}`;
    if (via === undefined) return own;
    if (!via.includes(this.#pseudonym)) return `${via}, ${own}`;
    const why = 'an instance of this proxy, or of one that it passed, leads back to it';
    throw new PdError('REQUEST_INVALID', `this request has been here before: ${why}`);
  }

  #routes(elsewhere: ServingParts['elsewhere']): void {
    const { app, log } = this;
    // Whatever its content type, the body is kept as it came: it goes on byte for byte, and curl sends JSON under other types.
    app.removeAllContentTypeParsers();
    app.addContentTypeParser('*', { parseAs: 'buffer' }, (_request, body, done) => done(null, body));
    app.setNotFoundHandler((request, reply) => {
      if (elsewhere) return elsewhere(request, reply);
      return reply.code(404).send(openAiError(noSuchPath(request)));
    });
    app.setErrorHandler((cause: Error & { statusCode?: number }, request, reply) => {
      const refused = cause.statusCode !== undefined && cause.statusCode < 500;
      const error = refused
        ? new PdError('REQUEST_INVALID', cause.message, {}, { cause })
        : PdError.from(cause);
      const status = refused ? cause.statusCode! : error.status;
      if (error.status >= 500) log.error({ err: cause }, error.message);
      else if (UNREAD.has(status)) this.#refusedUnread(request, status, error);
      if (status === 413) keepReading(reply);
      return reply.code(status).send(openAiError(error));
    });
    for (const route of ROUTES) {
      app.post(route, async (request, reply) => {
        reply.hijack();
        await this.#serve(route, request, reply.raw);
      });
    }
  }

  /** Counted where requests are that are served: of other paths nothing is. */
  #refusedUnread(request: FastifyRequest, status: number, { code, message }: PdError): void {
    const path = askedPath(request);
    this.log.info({ code }, `refused ${request.method} ${path}: ${message}`);
    const route = ROUTES.find((one) => one === path);
    if (route === undefined) return;
    const { statuses, errors } = this.metrics.routeOf(route);
    statuses.inc(status);
    errors.inc(code);
  }

  async #serve(route: string, request: FastifyRequest, out: ServerResponse): Promise<void> {
    const holder = this.guard.holder(request)?.name;
    if (holder !== undefined) this.metrics.keyRequests.inc(holder);
    const proxied = new ProxiedRequest(this, route, request.headers, out, holder);
    this.#running.add(proxied);
    try {
      await proxied.answer(bodyOf(request));
    } finally {
      this.#running.delete(proxied);
      if (this.#running.size === 0) this.#events.emit('idle');
    }
  }
}

/** A body as it came; a request without any has none. */
export function bodyOf({ body }: FastifyRequest): Uint8Array<ArrayBuffer> {
  return body instanceof Uint8Array ? (body as Uint8Array<ArrayBuffer>) : new Uint8Array(0);
}

class ProxiedRequest implements ClientRequest {
  readonly route: string;
  readonly headers: IncomingHttpHeaders;
  readonly out: ServerResponse;
  readonly end: StreamEnd;
  readonly receipt: Receipt;
  readonly signal = new Cancellation();
  via = '';
  readonly #serving: Serving;
  /** Name of the client's key; absent where none is needed. */
  readonly #holder: string | undefined;
  #clientGone = false;
  /** Of the last attempt, if there was one. */
  #requestId: string;

  constructor(
    serving: Serving,
    route: string,
    headers: IncomingHttpHeaders,
    out: ServerResponse,
    holder: string | undefined,
  ) {
    this.#serving = serving;
    this.route = route;
    this.headers = headers;
    this.out = out;
    this.end = streamEnd(route);
    this.#holder = holder;
    this.receipt = serving.receipts.begin(route, holder);
    this.receipt.trace = serving.traces?.begin(headers);
    this.#requestId = this.receipt.id;
  }

  /** Answers in every case; never rejects. To be called once. */
  async answer(body: Uint8Array<ArrayBuffer>): Promise<void> {
    const { metrics, bodies, coordinator, receipts, traces } = this.#serving;
    const { route, out, receipt, signal } = this;
    let error: PdError | undefined;
    onClientGone(out, () => {
      this.#clientGone = true;
      signal.abort(new PdError('REQUEST_ABORTED', `${route}: the client went away`));
    });
    metrics.inFlight.inc();
    try {
      if (this.#serving.draining) throw new PdError('SERVER_DRAINING', 'this proxy is stopping');
      this.via = this.#serving.via(this.headers);
      const read = await bodies.read(body, signal, coordinator.wanted, route);
      signal.throwIfAborted();
      receipt.readAt = monotonicMs();
      receipt.model = read.model;
      receipt.prompts = read.prompts;
      receipt.streamed = read.streamed;
      receipt.promptTokens = read.tokens;
      receipt.tokensKnown = read.tokensKnown;
      const visit = await coordinator.enter(this.#wish(read), signal);
      receipt.placedAt = monotonicMs();
      receipt.queuedMs = visit.queuedMs;
      try {
        await this.#throughPairs(read, visit);
      } finally {
        visit.end();
      }
    } catch (cause) {
      error = PdError.from(cause);
      this.#fail(error);
    } finally {
      const status = this.#clientGone ? CLIENT_GONE : out.statusCode;
      metrics.inFlight.dec();
      const tally = metrics.routeOf(route);
      tally.statuses.inc(status);
      receipts.end(receipt, status, error?.code);
      tally.seconds.observe((monotonicMs() - receipt.receivedAt) / 1_000);
      traces?.ended(receipt);
    }
  }

  #wish(prompt: RequestBody): Wish {
    const { headers } = this;
    const told = Number(single(headers['x-priority']) ?? prompt.priority);
    return {
      key: this.#holder ?? keyOf(headers.authorization),
      priority: Math.max(-MOST_PRIORITY, Math.min(MOST_PRIORITY, Number.isInteger(told) ? told : 0)),
      // An empty one is nobody's: all who send that would share an instance.
      session: single(headers[this.#serving.config.sessionHeader]) || prompt.user || undefined,
      prompt,
    };
  }

  async #throughPairs(body: RequestBody, visit: Visit): Promise<void> {
    const { log } = this.#serving;
    const holder = this.#holder;
    for (;;) {
      const { producer, consumer } = visit.placement.pair;
      const attempt = new Attempt(this.#serving, this, body, visit);
      const { requestId } = attempt;
      this.#requestId = requestId;
      log.info(
        holder === undefined ? { requestId } : { requestId, key: holder },
        `handle_request count: ${visit.count}, ${instanceLabel(producer)} 👉 ${instanceLabel(consumer)}`,
      );
      try {
        await attempt.run();
        return;
      } catch (cause) {
        const error = PdError.from(cause);
        if (!(error instanceof InstanceRefused)) {
          blame(error, visit);
          throw error;
        }
        const next = await visit.retry(error.instance.role);
        this.signal.throwIfAborted();
        if (!next) throw error;
        log.warn({ requestId }, `${error.message}; trying another pair`);
      }
    }
  }

  #fail(error: PdError): void {
    const level = this.#clientGone || error.status < 500 ? 'info' : 'warn';
    const { metrics, log } = this.#serving;
    metrics.routeOf(this.route).errors.inc(error.code);
    log[level]({ requestId: this.#requestId, code: error.code }, `${this.route}: ${error.message}`);
    answerError(this.out, error, { requestId: this.#requestId, end: this.end });
  }
}

function single(header: string | string[] | undefined): string | undefined {
  return Array.isArray(header) ? header[0] : header;
}

/** Whose request it is, without keeping what it is known by. */
function keyOf(authorization: string | undefined): string {
  return authorization === undefined ? '' : hash('sha256', authorization, 'base64');
}

/** What speaks against the instance that it names. */
function blame({ code, context }: PdError, visit: Visit): void {
  if (code !== 'UPSTREAM_FAILED' && code !== 'UPSTREAM_TIMEOUT') return;
  const { placement } = visit;
  for (const { role, httpAddress } of Object.values(placement.pair))
    if (httpAddress === context['peer']) visit.judge(placement, role, false);
}
