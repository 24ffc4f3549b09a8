/** The proxy as a whole: discovery, forwarding, and what it says about itself. */
import { setMaxListeners } from 'node:events';
import fastify, { type FastifyInstance } from 'fastify';
import type { ProxyConfig } from '../config/proxy-config.ts';
import { PdError } from '../errors.ts';
import { formatHostPort, type HostPort } from '../net/address.ts';
import { hostAddress } from '../net/local.ts';
import { listenError } from '../net/port-holder.ts';
import { createLogger, type Logger } from '../observability/log.ts';
import { openAiError } from '../openai-error.ts';
import { Discovery } from './discovery.ts';
import { answerError, Forwarder } from './forward.ts';
import { createProxyMetrics, type ProxyMetrics } from './metrics.ts';
import { ModelDirectory } from './models.ts';
import { type Instance, InstanceRegistry } from './registry.ts';
import { Upstream } from './upstream.ts';

const ROUTES = ['/v1/completions', '/v1/chat/completions'] as const;
/** A prompt of a million token ids fits. */
const BODY_LIMIT = 32 * 1024 * 1024;
/** For a client to send its whole request. */
const REQUEST_TIMEOUT_MS = 120_000;
/** For the last bytes of answers to leave. */
const CLOSE_MS = 2_000;

/** How long `untilPaired` waits unless told. */
const PAIR_TIMEOUT_MS = 60_000;

/** A proxy that serves: close it, its sockets keep the process alive. */
export class PdProxy {
  readonly #config: ProxyConfig;
  readonly #log: Logger;
  readonly #registry: InstanceRegistry;
  readonly #metrics: ProxyMetrics;
  readonly #upstream = new Upstream();
  readonly #stop = new AbortController();
  readonly #models: ModelDirectory;
  readonly #forwarder: Forwarder;
  readonly #server: FastifyInstance;
  #discovery: Discovery | undefined;
  #http: HostPort | undefined;
  #running = 0;
  #idle: (() => void) | undefined;
  readonly #waiting = new Set<() => void>();
  #draining = false;
  #closing: Promise<void> | undefined;

  private constructor(config: ProxyConfig) {
    this.#config = config;
    this.#log = createLogger(config.log, 'proxy');
    this.#registry = new InstanceRegistry(config.instanceTimeoutMs);
    this.#metrics = createProxyMetrics(this.#registry);
    setMaxListeners(0, this.#stop.signal); // one per request under way
    const common = { registry: this.#registry, upstream: this.#upstream, log: this.#log };
    this.#models = new ModelDirectory({ ...common, stop: this.#stop.signal });
    this.#forwarder = new Forwarder({
      ...common,
      metrics: this.#metrics,
      prefillTimeoutMs: config.prefillTimeoutMs,
      decodeIdleTimeoutMs: config.decodeIdleTimeoutMs,
      overlap: config.overlap,
    });
    this.#server = fastify({
      bodyLimit: BODY_LIMIT,
      requestTimeout: REQUEST_TIMEOUT_MS,
      forceCloseConnections: 'idle',
      logger: false,
    });
    this.#routes();
  }

  /** Listens for pings and for requests. Throws PORT_IN_USE or ADDRESS_INVALID. */
  static async start(config: ProxyConfig): Promise<PdProxy> {
    const proxy = new PdProxy(config);
    try {
      await proxy.#listen();
      return proxy;
    } catch (error) {
      await proxy.close(0);
      throw error;
    }
  }

  /** Where clients connect, the port chosen where 0 was asked for. */
  get httpAddress(): HostPort {
    return this.#http!;
  }

  /** Where pings go. */
  get discoveryAddress(): HostPort {
    return this.#discovery!.address;
  }

  /** Live instances. */
  get instances(): readonly Instance[] {
    return this.#registry.list();
  }

  /** Resolves once a producer and a consumer that fit each other ping. Throws NO_INSTANCE at the deadline, or SERVER_DRAINING. */
  async untilPaired(timeoutMs: number = PAIR_TIMEOUT_MS): Promise<void> {
    const { signal } = this.#stop;
    let look = () => {};
    let timer: NodeJS.Timeout | undefined;
    try {
      await new Promise<void>((resolve, reject) => {
        look = () => {
          if (signal.aborted) reject(PdError.from(signal.reason));
          else if (this.#registry.paired) resolve();
        };
        const late = () => {
          const seen = this.instances.map(({ role, httpAddress }) => `${role} ${httpAddress}`).join(', ');
          const why = `no producer and consumer that fit pinged within ${timeoutMs} ms`;
          reject(new PdError('NO_INSTANCE', `${why}; live instances: ${seen || 'none'}`));
        };
        timer = setTimeout(late, timeoutMs);
        this.#waiting.add(look);
        signal.addEventListener('abort', look);
        look();
      });
    } finally {
      clearTimeout(timer);
      this.#waiting.delete(look);
      signal.removeEventListener('abort', look);
    }
  }

  /** Takes no new requests, lets those under way end within `drainMs`, breaks the rest. Idempotent; a shorter wait wins. */
  close(drainMs: number = this.#config.drainTimeoutMs): Promise<void> {
    this.#draining = true;
    if (drainMs === 0) this.#break();
    this.#closing ??= this.#drain(drainMs);
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #listen(): Promise<void> {
    const { instanceTimeoutMs, allowInstances } = this.#config;
    const [http, discovery] = await Promise.all([
      bindAddress(this.#config.http),
      bindAddress(this.#config.discovery),
    ]);
    this.#discovery = await Discovery.start({
      bind: discovery,
      ...(allowInstances && { allow: allowInstances }),
      registry: this.#registry,
      log: this.#log,
      sweepMs: Math.min(1_000, Math.max(10, instanceTimeoutMs / 4)),
      onPing: (address) => this.#models.onPing(address),
      onBadPing: () => this.#metrics.badPings.inc(),
      onChange: ({ instance }) => {
        this.#models.forget(instance.httpAddress);
        for (const look of this.#waiting) look();
      },
    });
    try {
      await this.#server.listen({ host: http.host, port: http.port });
    } catch (cause) {
      throw await listenError(cause, http, 'listening for requests');
    }
    const bound = this.#server.server.address();
    if (bound === null || typeof bound === 'string') throw new PdError('INTERNAL', 'no TCP address');
    this.#http = { host: http.host, port: bound.port };
    this.#log.info(`Discovery on tcp://${formatHostPort(this.#discovery.address)}`);
    this.#log.info(`Running on http://${formatHostPort(this.#http)}`);
  }

  async #drain(drainMs: number): Promise<void> {
    const started = this.#http !== undefined;
    if (started)
      this.#log.info(`draining, at most ${drainMs / 1_000} s: ${this.#running} requests under way`);
    if (this.#running > 0) {
      const timer = setTimeout(() => this.#break(), drainMs);
      await new Promise<void>((resolve) => {
        this.#idle = resolve;
      });
      clearTimeout(timer);
    }
    this.#break();
    // Connections that wait for a next request are closed, answers still in flight are not cut.
    const timer = setTimeout(() => this.#server.server.closeAllConnections(), CLOSE_MS);
    await this.#server.close();
    clearTimeout(timer);
    await this.#discovery?.close();
    await this.#upstream.close();
    if (started) this.#log.info('Stopped');
  }

  #break(): void {
    if (this.#stop.signal.aborted) return;
    this.#stop.abort(new PdError('SERVER_DRAINING', 'the proxy is stopping'));
  }

  #routes(): void {
    const app = this.#server;
    // Read here, not by content type: the body goes on byte by byte, and curl sends JSON under other names.
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
      if (!refused) this.#log.error({ err: cause }, error.message);
      return reply.code(refused ? cause.statusCode! : error.status).send(openAiError(error));
    });
    for (const route of ROUTES) {
      app.post(route, async (request, reply) => {
        reply.hijack();
        const out = reply.raw;
        if (this.#draining) {
          this.#metrics.requests.inc({ route, status: 503 });
          return answerError(out, new PdError('SERVER_DRAINING', 'this proxy is stopping'));
        }
        this.#running++;
        try {
          const body = Buffer.isBuffer(request.body) ? request.body : Buffer.alloc(0);
          const stop = this.#stop.signal;
          await this.#forwarder.handle({ route, headers: request.headers, body, out, stop });
        } finally {
          if (--this.#running === 0) this.#idle?.();
        }
      });
    }
    app.get('/health', async () => this.#health());
    app.get('/v1/models', async () => ({ object: 'list', data: await this.#models.list() }));
    app.get('/metrics', async (_request, reply) => {
      const { registry } = this.#metrics;
      return reply.type(registry.contentType).send(await registry.metrics());
    });
  }

  #health() {
    const instances = this.#registry.list();
    const count = (role: string) => instances.filter((instance) => instance.role === role).length;
    return {
      status: this.#draining ? 'draining' : 'ok',
      counts: { producer: count('producer'), consumer: count('consumer') },
      instances: instances.map((instance) => ({
        role: instance.role,
        http_address: instance.httpAddress,
        zmq_address: instance.zmqAddress,
        model: instance.fingerprint?.model ?? null,
        fingerprint: instance.fingerprint?.digest ?? null,
        send_type: instance.sendType ?? null,
        models: instance.models ?? null,
        /** Since its last ping. */
        age_seconds: Math.round(this.#registry.age(instance)) / 1_000,
        refused_connection: this.#registry.quarantined(instance),
      })),
    };
  }
}

/** Of a name, the one address that HTTP and pings are both bound to. */
async function bindAddress({ host, port }: HostPort): Promise<HostPort> {
  return { host: await hostAddress(host, 0, 'address to listen on'), port };
}
