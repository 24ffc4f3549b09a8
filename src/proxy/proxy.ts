/** The proxy as a whole: its HTTP server, discovery, start and stop. */
import { EventEmitter, once, setMaxListeners } from 'node:events';
import fastify, { type FastifyInstance, type FastifyRequest } from 'fastify';
import { Guard } from '../access/guard.ts';
import type { ProxyConfig } from '../config/proxy-config.ts';
import { PdError } from '../errors.ts';
import { formatHostPort, type HostPort, isLoopback, isUnspecified } from '../net/address.ts';
import { Etcd } from '../net/etcd.ts';
import { NO_JSON_SCHEMAS } from '../net/json-schemas.ts';
import { announceHost, hostAddress } from '../net/local.ts';
import { listenError } from '../net/port-holder.ts';
import { plural } from '../observability/bytes.ts';
import { createLogger, type Logger } from '../observability/log.ts';
import { Timelines } from '../observability/timelines.ts';
import { openAiError } from '../openai-error.ts';
import { z } from '../zod.ts';
import { Admission } from './admission.ts';
import type { ProxyContext, ProxyStage } from './attempt.ts';
import { BodyReader, type BodyReaderOptions } from './body-reader.ts';
import { PromptCaches } from './caches.ts';
import { Discovery } from './discovery.ts';
import { EtcdInstances } from './etcd-instances.ts';
import { createProxyMetrics, type ProxyMetrics } from './metrics.ts';
import { ModelDirectory } from './models.ts';
import { Probes } from './probes.ts';
import { type Instance, InstanceRegistry } from './registry.ts';
import { answerError } from './relay.ts';
import { ProxiedRequest } from './request.ts';
import { RetryBudget } from './retry-budget.ts';
import { readWhole, Upstream, type WholeAnswer } from './upstream.ts';

/** With keys, these take one that says `admin`. */
const ADMIN_ROUTES = new Set(['/admin/drain', '/debug/state']);
const ROUTES = ['/v1/completions', '/v1/chat/completions', '/v1/responses'] as const;
/** A prompt of a million token ids fits. */
const BODY_LIMIT = 32 * 1024 * 1024;
/** For a client to send its whole request. */
const REQUEST_TIMEOUT_MS = 120_000;
/** For the last bytes of answers to leave. */
const CLOSE_MS = 2_000;
/** How long `untilPaired` waits by default. */
const PAIR_TIMEOUT_MS = 60_000;
/** For a consumer to say what may be asked of it, and bytes of that. */
const OPENAPI_MS = 5_000;
const OPENAPI_BYTES = 4 * 1024 * 1024;

/**
 * Parts of a proxy that a test may replace.
 * @internal
 */
export interface ProxyParts {
  readonly bodyReader: (log: Logger, options: BodyReaderOptions) => Pick<BodyReader, 'read' | 'close'>;
}

const PARTS: ProxyParts = { bodyReader: (log, options) => new BodyReader(log, options) };

/** A proxy that is serving. Close it: its sockets keep the process alive. */
export class PdProxy {
  readonly #config: ProxyConfig;
  readonly #log: Logger;
  readonly #registry: InstanceRegistry;
  readonly #metrics: ProxyMetrics;
  readonly #guard: Guard;
  readonly #upstream: Upstream;
  readonly #caches: PromptCaches;
  readonly #admission: Admission;
  #probes: Probes | undefined;
  readonly #bodies: Pick<BodyReader, 'read' | 'close'>;
  readonly #stop = new AbortController();
  readonly #models: ModelDirectory;
  readonly #timelines = new Timelines<ProxyStage>();
  readonly #context: ProxyContext;
  readonly #server: FastifyInstance;
  #discovery: Discovery | undefined;
  #etcd: EtcdInstances | undefined;
  #http: HostPort | undefined;
  /** `instances`: one has come or gone. `idle`: no request is under way any more. */
  readonly #events = new EventEmitter<{ instances: []; idle: [] }>();
  #count = 0;
  #running = 0;
  #draining = false;
  #closing: Promise<void> | undefined;

  /** `tokenizer`: its digest, where there is one. */
  private constructor(config: ProxyConfig, parts: ProxyParts, tokenizer: string | undefined) {
    this.#config = config;
    this.#log = createLogger(config.log, 'proxy');
    if (config.upstream?.keyFile !== undefined && config.allowInstances === undefined) {
      const why = 'anybody may ping, and would get that key';
      throw new PdError('CONFIG_INVALID', `--worker-key-file needs --allow-instances: ${why}`);
    }
    const { policy, prefillPolicy = policy, decodePolicy = policy } = config;
    const policies = { producer: prefillPolicy, consumer: decodePolicy };
    this.#registry = new InstanceRegistry(config.instanceTimeoutMs, undefined, policies);
    this.#metrics = createProxyMetrics(
      this.#registry,
      () => this.#caches.size,
      () => this.#admission.queued,
    );
    this.#guard = new Guard({
      config: config.access,
      log: this.#log,
      admin: ADMIN_ROUTES,
      onRefused: (reason) => this.#metrics.keysRefused.inc({ reason }),
    });
    this.#upstream = new Upstream({
      access: config.upstream ?? {},
      keyed: this.#guard.keyed,
      log: this.#log,
    });
    this.#caches = new PromptCaches(config, this.#log, this.#metrics, tokenizer);
    const { maxRunning, maxRunningTokens, maxQueued, queueTimeoutMs } = config;
    this.#admission = new Admission(
      { requests: maxRunning, tokens: maxRunningTokens, queued: maxQueued, waitMs: queueTimeoutMs },
      (reason) => this.#metrics.turnedAway.inc({ reason }),
    );
    setMaxListeners(0, this.#stop.signal, this.#events); // one per request under way, one per caller who waits
    this.#bodies = parts.bodyReader(this.#log, {
      tokenizer: config.tokenizer,
      onTokenized: (result) => this.#metrics.tokenized.inc({ result }),
    });
    this.#context = {
      config,
      registry: this.#registry,
      upstream: this.#upstream,
      metrics: this.#metrics,
      timelines: this.#timelines,
      log: this.#log,
      bodies: this.#bodies,
      caches: this.#caches,
      admission: this.#admission,
      retries: new RetryBudget(),
      nextCount: () => this.#count++,
    };
    this.#models = new ModelDirectory(this.#context, this.#stop.signal);
    this.#server = fastify({
      https: this.#guard.https,
      bodyLimit: BODY_LIMIT,
      requestTimeout: REQUEST_TIMEOUT_MS,
      forceCloseConnections: 'idle',
      logger: false,
      schemaController: NO_JSON_SCHEMAS,
    }) as unknown as FastifyInstance;
    this.#guard.attach(this.#server);
    this.#routes();
  }

  /** Listens for pings and for requests. Throws PORT_IN_USE or ADDRESS_INVALID; of its tokenizer CHECKPOINT_INVALID or MODEL_UNSUPPORTED. */
  static start(config: ProxyConfig): Promise<PdProxy>;
  /** @internal */
  static start(config: ProxyConfig, parts?: ProxyParts): Promise<PdProxy>;
  static async start(config: ProxyConfig, parts: ProxyParts = PARTS): Promise<PdProxy> {
    const { tokenizer: dir } = config;
    // Whole, though the thread loads its own: one that cannot be used is to be known before anybody asks.
    const digest = dir && (await (await import('../model/tokenizer.ts')).Tokenizer.load(dir)).digest;
    const proxy = new PdProxy(config, parts, digest);
    try {
      await proxy.#listen();
      return proxy;
    } catch (error) {
      await proxy.close(0);
      throw error;
    }
  }

  /** Where clients connect, with the port that was chosen where 0 was asked for. */
  get httpAddress(): HostPort {
    return this.#http!;
  }

  /** Where instances send their pings. */
  get discoveryAddress(): HostPort {
    return this.#discovery!.address;
  }

  /** Live instances. */
  get instances(): readonly Instance[] {
    return this.#registry.list();
  }

  /** Resolves once a producer and a consumer that fit each other ping. Throws NO_INSTANCE at the deadline, or SERVER_DRAINING. */
  async untilPaired(timeoutMs: number = PAIR_TIMEOUT_MS): Promise<void> {
    const late = new AbortController();
    const timer = setTimeout(() => {
      const seen = this.instances.map(({ role, httpAddress }) => `${role} ${httpAddress}`).join(', ');
      const why = `no producer and consumer that fit each other pinged within ${timeoutMs} ms`;
      late.abort(new PdError('NO_INSTANCE', `${why}; live instances: ${seen || 'none'}`));
    }, timeoutMs);
    const signal = AbortSignal.any([this.#stop.signal, late.signal]);
    try {
      for (;;) {
        signal.throwIfAborted();
        if (this.#registry.paired) return;
        await once(this.#events, 'instances', { signal });
      }
    } catch (error) {
      throw PdError.from(signal.aborted ? signal.reason : error);
    } finally {
      clearTimeout(timer);
    }
  }

  /** Takes no new requests, lets those under way end within `drainMs`, aborts the rest. Idempotent; a later call with 0 aborts at once. */
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
    const { instanceTimeoutMs, allowInstances, upstream, registry: etcd } = this.#config;
    const [http, discovery] = await Promise.all([
      bindAddress(this.#config.http),
      bindAddress(this.#config.discovery),
    ]);
    this.#discovery = await Discovery.start({
      bind: discovery,
      ...(allowInstances && { allow: allowInstances }),
      keyed: upstream?.keyFile !== undefined,
      needsTls: upstream?.ca !== undefined,
      registry: this.#registry,
      log: this.#log,
      sweepMs: Math.min(1_000, Math.max(10, instanceTimeoutMs / 4)),
      onPing: (address) => this.#models.onPing(address),
      onBadPing: () => this.#metrics.badPings.inc(),
      onChange: (change) => {
        this.#models.forget(change.instance.httpAddress);
        this.#caches.changed(change);
        this.#events.emit('instances');
      },
    });
    if (etcd) {
      const discovery = this.#discovery;
      this.#etcd = new EtcdInstances({
        etcd: new Etcd(etcd),
        log: this.#log,
        take: (ping) => discovery.take(ping),
        drop: (ping) => discovery.drop(ping),
      });
    }
    const { healthIntervalMs: intervalMs } = this.#config;
    if (intervalMs > 0) {
      const { registry, upstream, log } = this.#context;
      this.#probes = new Probes({ registry, upstream, log, intervalMs });
    }
    try {
      await this.#server.listen({ host: http.host, port: http.port });
    } catch (cause) {
      throw await listenError(cause, http, 'listening for requests');
    }
    const bound = this.#server.server.address();
    if (bound === null || typeof bound === 'string') throw new PdError('INTERNAL', 'no TCP address');
    this.#http = { host: http.host, port: bound.port };
    this.#log.info(`Discovery on tcp://${reachableAt(this.#discovery.address)}`);
    this.#log.info(`Running on http${this.#guard.https ? 's' : ''}://${reachableAt(this.#http)}`);
  }

  async #drain(drainMs: number): Promise<void> {
    const started = this.#http !== undefined;
    if (started)
      this.#log.info(`draining, at most ${drainMs / 1_000} s: ${plural(this.#running, 'request')} under way`);
    if (this.#running > 0) {
      const timer = setTimeout(() => this.#break(), drainMs);
      await once(this.#events, 'idle');
      clearTimeout(timer);
    }
    this.#break();
    // Idle connections are closed; answers still on their way are not cut.
    const timer = setTimeout(() => this.#server.server.closeAllConnections(), CLOSE_MS);
    await this.#server.close();
    clearTimeout(timer);
    await this.#etcd?.close();
    await this.#discovery?.close();
    this.#caches.close();
    this.#probes?.close();
    await this.#upstream.close();
    this.#guard.close();
    await this.#bodies.close();
    if (started) this.#log.info('Stopped');
  }

  #break(): void {
    if (this.#stop.signal.aborted) return;
    void this.#bodies.close(); // who waits for it is to hear that the proxy stops
    this.#stop.abort(new PdError('SERVER_DRAINING', 'the proxy is stopping'));
  }

  #routes(): void {
    const app = this.#server;
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
      if (error.status >= 500) this.#log.error({ err: cause }, error.message);
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
          const holder = this.#guard.holder(request)?.name;
          if (holder !== undefined) this.#metrics.keyRequests.inc({ key: holder });
          const { headers } = request;
          const received = {
            route,
            headers,
            body: bodyOf(request),
            out,
            ...(holder !== undefined && { holder }),
          };
          await new ProxiedRequest(this.#context, received).answer(this.#stop.signal);
        } finally {
          if (--this.#running === 0) this.#events.emit('idle');
        }
      });
    }
    app.post('/admin/drain', async (request) => this.#drainInstance(request));
    app.get('/health', async () => this.#health());
    if (this.#config.debugState) app.get('/debug/state', async (request) => this.#debugState(request));
    app.get('/ready', async (_request, reply) => {
      const ready = !this.#draining && this.#registry.paired;
      return reply.code(ready ? 200 : 503).send({ ready });
    });
    app.get('/v1/models', async () => ({ object: 'list', data: await this.#models.list() }));
    app.get('/openapi.json', async (_request, reply) => {
      const { response, body } = await this.#openApi();
      reply.code(response.statusCode).type(String(response.headers['content-type'] ?? 'application/json'));
      return reply.send(body);
    });
    app.get('/metrics', async (_request, reply) => {
      const { registry } = this.#metrics;
      return reply.type(registry.contentType).send(await registry.metrics());
    });
  }

  /**
   * `{"instance": "host:port", "drain": false}`, of holders of an admin key, or without keys of clients on this machine: what that instance
   * has goes on, and it gets nothing new.
   */
  #drainInstance(request: FastifyRequest) {
    if (!this.#guard.keyed && !isLoopback(request.ip)) {
      throw new PdError('REQUEST_INVALID', 'POST /admin/drain is for clients on this machine');
    }
    const { instance: address, drain } = readDrain(bodyOf(request));
    if (!this.#registry.drain(address, drain)) {
      throw new PdError('REQUEST_INVALID', `no instance ${address} pings this proxy`, { param: 'instance' });
    }
    this.#log.info(`${address} ${drain ? 'gets no new requests: it drains' : 'gets requests again'}`);
    const instance = this.#registry.list().find(({ httpAddress }) => httpAddress === address);
    const underWay = instance && this.#registry.workOf(instance)?.own;
    return { instance: address, draining: drain, requests_under_way: underWay ?? 0 };
  }

  /** Ids of other people's requests are for clients on this machine. */
  #debugState(request: FastifyRequest) {
    if (!isLoopback(request.ip)) {
      throw new PdError('REQUEST_INVALID', 'GET /debug/state is for clients on this machine');
    }
    return { requests: this.#running, recentRequests: this.#timelines.recent() };
  }

  /** As the proxy takes it to be: what the instance tells, and what it has been given since. */
  #loadOf(instance: Instance) {
    const work = this.#registry.workOf(instance);
    if (!work) return null;
    return { requests: work.requests, queued_tokens: work.queuedTokens, kv_cache_usage: work.kvUse };
  }

  /** What a consumer says may be asked: the answer is its own. Throws NO_INSTANCE, or that it cannot be reached. */
  async #openApi(): Promise<WholeAnswer> {
    const [instance] = this.#registry.list('consumer');
    if (!instance)
      throw new PdError('NO_INSTANCE', 'no consumer pings this proxy, so nothing is known of what it takes');
    const call = { instance, what: 'GET /openapi.json', timeoutMs: OPENAPI_MS, timeoutName: 'fixed' };
    const signal = AbortSignal.any([AbortSignal.timeout(OPENAPI_MS), this.#stop.signal]);
    const response = await this.#upstream.ask(call, { path: '/openapi.json', headers: {}, signal });
    return await readWhole(response, OPENAPI_BYTES);
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
        draining: this.#registry.draining(instance),
        breaker: this.#registry.breakerOf(instance)?.state ?? null,
        load: this.#loadOf(instance),
      })),
    };
  }
}

const DRAIN = z.strictObject({ instance: z.string(), drain: z.boolean().default(true) });

/** Throws REQUEST_INVALID. */
function readDrain(body: Uint8Array): z.infer<typeof DRAIN> {
  try {
    return DRAIN.parse(JSON.parse(Buffer.from(body).toString('utf8')));
  } catch (cause) {
    const form = 'the body must be {"instance": "host:port"}, with "drain": false to undo it';
    throw new PdError('REQUEST_INVALID', form, {}, { cause });
  }
}

/** A body as it came; a request without any has none. */
function bodyOf({ body }: FastifyRequest): Uint8Array<ArrayBuffer> {
  return body instanceof Uint8Array ? (body as Uint8Array<ArrayBuffer>) : new Uint8Array(0);
}

/** For the log: an address that can be opened, and what is bound where that is every address. */
function reachableAt({ host, port }: HostPort): string {
  const bound = formatHostPort({ host, port });
  return isUnspecified(host)
    ? `${formatHostPort({ host: announceHost(host), port })} (bound to ${bound})`
    : bound;
}

/** Resolves a name to one address, so that HTTP and pings are bound to the same. */
async function bindAddress({ host, port }: HostPort): Promise<HostPort> {
  return { host: await hostAddress(host, 0, 'address to listen on'), port };
}
