/** The proxy as a whole: its HTTP server, discovery, start and stop. */
import { EventEmitter, once, setMaxListeners } from 'node:events';
import type { FastifyRequest } from 'fastify';
import type { Guard } from '../access/guard.ts';
import type { ProxyConfig } from '../config/proxy-config.ts';
import { within } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort, type HostPort, isLoopback, isUnspecified } from '../net/address.ts';
import { Etcd } from '../net/etcd.ts';
import { announceHost, hostAddress } from '../net/local.ts';
import { listenError } from '../net/port-holder.ts';
import { plural } from '../observability/bytes.ts';
import { createLogger, type Logger } from '../observability/log.ts';
import { modelNotFound, openAiError } from '../openai-error.ts';
import { packageVersion } from '../version.ts';
import { z } from '../zod.ts';
import { Admission } from './admission.ts';
import type { ProxyContext } from './attempt.ts';
import { BodyReader, type BodyReaderOptions } from './body-reader.ts';
import { PromptCaches } from './caches.ts';
import { type Coordinator, LocalCoordinator } from './coordinator.ts';
import { Discovery } from './discovery.ts';
import { EtcdInstances } from './etcd-instances.ts';
import { createProxyMetrics, type ProxyMetrics } from './metrics.ts';
import { ModelDirectory } from './models.ts';
import { NamedInstances } from './named-instances.ts';
import { Probes } from './probes.ts';
import { type Receipt, Receipts, timelinesOf } from './receipts.ts';
import { type Instance, InstanceRegistry } from './registry.ts';
import { Relays } from './relays.ts';
import { routeOf } from './route.ts';
import { bodyOf, proxyGuard, Serving } from './serving.ts';
import { Ui } from './ui.ts';
import { MOST_UI_REQUESTS, type UiSnapshot, uiInstance, uiRequest } from './ui-state.ts';
import { readWhole, Upstream, type WholeAnswer } from './upstream.ts';

/** How long `untilPaired` waits by default. */
const PAIR_TIMEOUT_MS = 60_000;
/** For a consumer to say what may be asked of it, and bytes of that. */
const OPENAPI_MS = 5_000;
const OPENAPI_BYTES = 4 * 1024 * 1024;

const VERSION = packageVersion();

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
  readonly #receipts = new Receipts();
  readonly #ui: Ui | undefined;
  readonly #startedAt = Date.now();
  readonly #coordinator: Coordinator;
  readonly #context: ProxyContext;
  /** What clients ask of the proxy itself, and where it is one process, everything. */
  readonly #serving: Serving;
  /** Of a proxy of several processes. */
  #relays: Relays | undefined;
  #discovery: Discovery | undefined;
  #etcd: EtcdInstances | undefined;
  #named: NamedInstances | undefined;
  #http: HostPort | undefined;
  /** `instances`: one has come or gone. */
  readonly #events = new EventEmitter<{ instances: [] }>();
  #draining = false;
  #closing: Promise<void> | undefined;

  /** `tokenizer`: its digest, where there is one. */
  private constructor(config: ProxyConfig, parts: ProxyParts, tokenizer: string | undefined) {
    this.#config = config;
    this.#log = createLogger(config.log, 'proxy');
    const { allowInstances, instances } = config;
    if (config.upstream?.keyFile !== undefined && allowInstances === undefined && instances.length === 0) {
      const why = 'anybody may ping, and would get that key';
      throw new PdError('CONFIG_INVALID', `--worker-key-file needs --allow-instances or --instances: ${why}`);
    }
    const { policy, prefillPolicy = policy, decodePolicy = policy } = config;
    const policies = { producer: prefillPolicy, consumer: decodePolicy };
    this.#registry = new InstanceRegistry(config.instanceTimeoutMs, undefined, policies);
    this.#metrics = createProxyMetrics({
      instances: this.#registry,
      cachedBlocks: () => this.#caches.size,
      queued: () => this.#admission.queued,
    });
    this.#guard = proxyGuard(config, this.#log, this.#metrics);
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
    setMaxListeners(0, this.#stop.signal, this.#events); // one per caller who waits
    this.#bodies = parts.bodyReader(this.#log, {
      // Bodies are read where they come.
      tokenizer: config.workers > 1 ? undefined : config.tokenizer,
      onTokenized: (result) => this.#metrics.tokenized.inc({ result }),
    });
    const shared = {
      registry: this.#registry,
      upstream: this.#upstream,
      metrics: this.#metrics,
      receipts: this.#receipts,
      log: this.#log,
    };
    const [caches, admission, bodies] = [this.#caches, this.#admission, this.#bodies];
    this.#coordinator = new LocalCoordinator({ ...shared, config, caches, admission });
    this.#models = new ModelDirectory(shared, this.#stop.signal);
    this.#context = { ...shared, config, coordinator: this.#coordinator, bodies };
    this.#serving = new Serving(this.#context, this.#guard, { behindRelays: config.workers > 1 });
    const snapshot = () => this.#uiSnapshot();
    if (config.ui !== 'off')
      this.#ui = new Ui({ config, log: this.#log, keyed: this.#guard.keyed, snapshot });
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

  /**
   * Where clients on this machine connect: loopback where every interface is bound, and the port that was chosen where 0 was asked for.
   */
  get httpAddress(): HostPort {
    return asDestination(this.#http!);
  }

  /** Where instances on this machine send their pings, likewise. */
  get discoveryAddress(): HostPort {
    return asDestination(this.#discovery!.address);
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
    if (this.#closing && drainMs === 0) {
      this.#relays?.drain(0);
      this.#serving.break();
    }
    this.#closing ??= this.#drain(drainMs);
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #listen(): Promise<void> {
    const {
      instanceTimeoutMs,
      allowInstances,
      instances,
      upstream,
      registry: etcd,
      otlpEndpoint,
      workers,
    } = this.#config;
    // Of several processes those that relay make them.
    if (otlpEndpoint !== undefined && workers === 1) {
      const { RequestTraces } = await import('./request-trace.ts');
      this.#context.traces = RequestTraces.open(this.#config, this.#metrics, this.#log);
    }
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
        if (change.kind === 'added') this.#relays?.instanceAdded(change.instance);
        this.#models.forget(change.instance.httpAddress);
        this.#caches.changed(change);
        this.#events.emit('instances');
      },
    });
    if (instances.length > 0) {
      const discovery = this.#discovery;
      this.#named = new NamedInstances({
        instances,
        upstream: this.#upstream,
        needsTls: upstream?.ca !== undefined,
        log: this.#log,
        intervalMs: Math.min(1_000, Math.ceil(instanceTimeoutMs / 4)),
        take: (ping, reached) => discovery.takeNamed(ping, reached),
      });
    }
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
      const [registry, upstream, log] = [this.#registry, this.#upstream, this.#log];
      this.#probes = new Probes({ registry, upstream, log, intervalMs });
    }
    const port = this.#config.workers > 1 ? await this.#listenApart(http) : await this.#listenAlone(http);
    this.#http = { host: http.host, port };
    this.#log.info(`Discovery on tcp://${reachableAt(this.#discovery.address)}`);
    this.#log.info(`Running on http${this.#guard.https ? 's' : ''}://${reachableAt(this.#http)}`);
  }

  /** Clients connect to this process. Resolves with the port. */
  async #listenAlone(http: HostPort): Promise<number> {
    const { app } = this.#serving;
    try {
      await app.listen({ host: http.host, port: http.port });
    } catch (cause) {
      throw await listenError(cause, http, 'listening for requests');
    }
    const bound = app.server.address();
    if (bound === null || typeof bound === 'string') throw new PdError('INTERNAL', 'no TCP address');
    return bound.port;
  }

  /** Clients are handed on to processes that relay, which come here with what they do not answer themselves. */
  async #listenApart(http: HostPort): Promise<number> {
    const [config, coordinator, log] = [this.#config, this.#coordinator, this.#log];
    this.#relays = await Relays.create({ config, coordinator, log, instances: () => this.instances });
    await this.#serving.app.listen({ path: this.#relays.ownerPath });
    return await this.#relays.start(http);
  }

  async #drain(drainMs: number): Promise<void> {
    const started = this.#http !== undefined;
    const running = this.#relays?.running ?? this.#serving.running;
    if (started)
      this.#log.info(`draining, at most ${drainMs / 1_000} s: ${plural(running, 'request')} under way`);
    await this.#ui?.close();
    this.#relays?.drain(drainMs);
    await this.#serving.drain(drainMs);
    await this.#relays?.drained();
    this.#stop.abort(new PdError('SERVER_DRAINING', 'the proxy is stopping'));
    await this.#serving.close();
    await this.#relays?.close();
    await this.#etcd?.close();
    this.#named?.close();
    await this.#discovery?.close();
    this.#caches.close();
    this.#probes?.close();
    await this.#context.traces?.close();
    await this.#upstream.close();
    this.#guard.close();
    await this.#bodies.close();
    if (started) this.#log.info('Stopped');
  }

  #routes(): void {
    const { app } = this.#serving;
    app.post('/admin/drain', async (request) => this.#drainInstance(request));
    app.get<{ Params: { '*': string } }>('/v1/requests/*', async (request, reply) => {
      const id = /^(.+)\/route$/.exec(request.params['*'])?.[1];
      const receipt = id === undefined ? undefined : await this.#receiptOf(id);
      if (receipt && this.#mayRead(request, receipt)) return await routeOf(receipt, this.#upstream);
      // The same where it is another's, so that nobody learns of it.
      const text =
        'there is no such request: GET /v1/requests/ID/route, with the x-pd-request-id of a recent one';
      return reply.code(404).send(openAiError(new PdError('REQUEST_INVALID', text)));
    });
    app.get('/health', async () => this.#health());
    this.#ui?.attach(app);
    if (this.#config.debugState) app.get('/debug/state', async (request) => this.#debugState(request));
    app.get('/ready', async (_request, reply) => {
      const ready = !this.#draining && this.#registry.paired;
      return reply.code(ready ? 200 : 503).send({ ready });
    });
    app.get('/v1/models', async () => ({ object: 'list', data: await this.#models.list() }));
    app.get<{ Params: { '*': string } }>('/v1/models/*', async ({ params: { '*': name } }) => {
      const models = await this.#models.list();
      const model = models.find(({ id }) => id === name);
      if (model) return model;
      const ids = models.map(({ id }) => id);
      throw modelNotFound(name, ids);
    });
    app.get('/openapi.json', async (_request, reply) => {
      const { response, body } = await this.#openApi();
      reply.code(response.statusCode).type(String(response.headers['content-type'] ?? 'application/json'));
      return reply.send(body);
    });
    app.get('/metrics', async (_request, reply) => {
      const { registry } = this.#metrics;
      const text = this.#relays
        ? await this.#relays.metrics(() => registry.getMetricsAsJSON())
        : await registry.metrics();
      return reply.type(registry.contentType).send(text);
    });
  }

  /**
   * `{"instance": "host:port", "drain": false}`, of holders of an admin key, or without keys of clients on this machine: what that instance
   * has goes on, and it gets nothing new.
   */
  #drainInstance(request: FastifyRequest) {
    // Whatever page a browser here has open may send this, too; only it says where it comes from.
    if (!this.#guard.keyed && (!isLoopback(request.ip) || request.headers.origin !== undefined)) {
      throw new PdError('REQUEST_INVALID', 'POST /admin/drain is for clients on this machine, not for pages');
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
  async #debugState(request: FastifyRequest) {
    if (!isLoopback(request.ip)) {
      throw new PdError('REQUEST_INVALID', 'GET /debug/state is for clients on this machine');
    }
    const receipts = (await this.#relays?.receipts()) ?? this.#receipts.recent();
    return {
      requests: this.#relays?.running ?? this.#serving.running,
      recentRequests: receipts.flatMap(timelinesOf),
    };
  }

  async #receiptOf(id: string): Promise<Receipt | undefined> {
    return this.#relays ? (await this.#relays.receipts({ of: id }))[0] : this.#receipts.get(id);
  }

  /** The holder of the key that it came with, and admins. Without keys whoever knows its id, which cannot be guessed. */
  #mayRead(request: FastifyRequest, receipt: Receipt): boolean {
    const holder = this.#guard.holder(request);
    return !holder || holder.admin || holder.name === receipt.holder;
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
    const signal = within(OPENAPI_MS, this.#stop.signal);
    const response = await this.#upstream.ask(call, { path: '/openapi.json', headers: {}, signal });
    return await readWhole(response, OPENAPI_BYTES);
  }

  async #uiSnapshot(): Promise<UiSnapshot> {
    const most = Math.ceil(MOST_UI_REQUESTS / this.#config.workers);
    const receipts = (await this.#relays?.receipts({ most })) ?? this.#receipts.recent();
    return {
      proxy: {
        status: this.#draining ? 'draining' : 'ok',
        version: VERSION,
        startedAt: this.#startedAt,
        running: this.#relays?.running ?? this.#serving.running,
        queued: this.#admission.queued,
        paired: this.#registry.paired,
        kept: MOST_UI_REQUESTS,
      },
      instances: this.#registry.list().map((instance) => uiInstance(instance, this.#registry, this.#caches)),
      requests: receipts.slice(-MOST_UI_REQUESTS).map(uiRequest),
    };
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
