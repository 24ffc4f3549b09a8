/** The HTTP server of a process that relays: OpenAI's routes, and what becomes of them when it stops. */
import { EventEmitter, once } from 'node:events';
import fastify, { type FastifyInstance, type FastifyRequest } from 'fastify';
import { Guard } from '../access/guard.ts';
import type { ProxyConfig } from '../config/proxy-config.ts';
import { PdError } from '../errors.ts';
import { NO_JSON_SCHEMAS } from '../net/json-schemas.ts';
import { checkHeads } from '../net/request-head.ts';
import type { Logger } from '../observability/log.ts';
import { openAiError } from '../openai-error.ts';
import type { ProxyContext } from './attempt.ts';
import type { ProxyMetrics } from './metrics.ts';
import { answerError } from './relay.ts';
import { ProxiedRequest } from './request.ts';
import { UI_EVENTS_ROUTE, UI_PAGE_ROUTES } from './ui.ts';

const ROUTES = ['/v1/completions', '/v1/chat/completions', '/v1/responses'] as const;
/** A prompt of a million token ids fits. */
const BODY_LIMIT = 32 * 1024 * 1024;
/** For a client to send its whole request. */
const REQUEST_TIMEOUT_MS = 120_000;
/** For the last bytes of answers to leave. */
const CLOSE_MS = 2_000;

/** With keys, these take one that says `admin`. */
const ADMIN_ROUTES = new Set(['/admin/drain', '/debug/state', UI_EVENTS_ROUTE]);

/** Close it. Throws CONFIG_INVALID. */
export function proxyGuard(
  { access: config }: ProxyConfig,
  log: Logger,
  metrics: Pick<ProxyMetrics, 'keysRefused'>,
): Guard {
  const onRefused = (reason: string) => metrics.keysRefused.inc({ reason });
  const open = new Set<string>(UI_PAGE_ROUTES);
  return new Guard({ config, log, admin: ADMIN_ROUTES, open, onRefused });
}

/** Whoever made it adds routes of its own, has it listen, drains and closes it. */
export class Serving {
  readonly app: FastifyInstance;
  readonly #context: ProxyContext;
  readonly #guard: Guard;
  readonly #running = new Set<ProxiedRequest>();
  /** `idle`: no request is under way any more. */
  readonly #events = new EventEmitter<{ idle: [] }>();
  #draining = false;

  /** `behindRelays`: only this proxy's own processes connect, which say whose the request is. */
  constructor(context: ProxyContext, guard: Guard, { behindRelays = false } = {}) {
    this.#context = context;
    this.#guard = guard;
    this.app = fastify({
      https: behindRelays ? null : guard.https,
      bodyLimit: BODY_LIMIT,
      requestTimeout: REQUEST_TIMEOUT_MS,
      forceCloseConnections: 'idle',
      logger: false,
      schemaController: NO_JSON_SCHEMAS,
      trustProxy: behindRelays,
    }) as unknown as FastifyInstance;
    guard.attach(this.app);
    checkHeads(this.app);
    this.#routes();
  }

  /** Requests under way. */
  get running(): number {
    return this.#running.size;
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
    const { bodies } = this.#context;
    void bodies.close(); // who waits for it is to hear that the proxy stops
    const reason = new PdError('SERVER_DRAINING', 'the proxy is stopping');
    for (const request of this.#running) request.abort(reason);
  }

  /** After `drain`. */
  async close(): Promise<void> {
    // Idle connections are closed; answers still on their way are not cut.
    const timer = setTimeout(() => this.app.server.closeAllConnections(), CLOSE_MS);
    await this.app.close();
    clearTimeout(timer);
  }

  #routes(): void {
    const { app } = this;
    const { metrics, log } = this.#context;
    // Whatever its content type, the body is kept as it came: it goes on byte for byte, and curl sends JSON under other types.
    app.removeAllContentTypeParsers();
    app.addContentTypeParser('*', { parseAs: 'buffer' }, (_request, body, done) => done(null, body));
    app.setNotFoundHandler((request, reply) => {
      const error = new PdError('REQUEST_INVALID', `no route ${request.method} ${request.url}`);
      return reply.code(404).send(openAiError(error));
    });
    app.setErrorHandler((cause: Error & { statusCode?: number }, _request, reply) => {
      const refused = cause.statusCode !== undefined && cause.statusCode < 500;
      const error = refused
        ? new PdError('REQUEST_INVALID', cause.message, {}, { cause })
        : PdError.from(cause);
      if (error.status >= 500) log.error({ err: cause }, error.message);
      return reply.code(refused ? cause.statusCode! : error.status).send(openAiError(error));
    });
    for (const route of ROUTES) {
      app.post(route, async (request, reply) => {
        reply.hijack();
        const out = reply.raw;
        if (this.#draining) {
          metrics.routeOf(route).statuses.inc(503);
          return answerError(out, new PdError('SERVER_DRAINING', 'this proxy is stopping'));
        }
        const holder = this.#guard.holder(request)?.name;
        if (holder !== undefined) metrics.keyRequests.inc(holder);
        const { headers } = request;
        const received = {
          route,
          headers,
          body: bodyOf(request),
          out,
          ...(holder !== undefined && { holder }),
        };
        const proxied = new ProxiedRequest(this.#context, received);
        this.#running.add(proxied);
        try {
          await proxied.answer();
        } finally {
          this.#running.delete(proxied);
          if (this.#running.size === 0) this.#events.emit('idle');
        }
      });
    }
  }
}

/** A body as it came; a request without any has none. */
export function bodyOf({ body }: FastifyRequest): Uint8Array<ArrayBuffer> {
  return body instanceof Uint8Array ? (body as Uint8Array<ArrayBuffer>) : new Uint8Array(0);
}
