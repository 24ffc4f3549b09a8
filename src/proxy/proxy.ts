/** The proxy as a whole: what it consists of, discovery, start and stop. */
import { randomBytes } from 'node:crypto';
import { EventEmitter, once, setMaxListeners } from 'node:events';
import type { ProxyConfig } from '../config/proxy-config.ts';
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort, type HostPort, isUnspecified } from '../net/address.ts';
import { Etcd } from '../net/etcd.ts';
import { announceHost, hostAddress } from '../net/local.ts';
import { listenError } from '../net/port-holder.ts';
import { plural } from '../observability/bytes.ts';
import { createLogger, type Logger } from '../observability/log.ts';
import { AboutProxy } from './about.ts';
import { Admission } from './admission.ts';
import { PromptCaches } from './caches.ts';
import { type Coordinator, LocalCoordinator } from './coordinator.ts';
import { Discovery } from './discovery.ts';
import { EtcdInstances } from './etcd-instances.ts';
import { createProxyMetrics } from './metrics.ts';
import { ModelDirectory } from './models.ts';
import { NamedInstances } from './named-instances.ts';
import { Probes } from './probes.ts';
import { type Instance, InstanceRegistry } from './registry.ts';
import { Relays } from './relays.ts';
import { type OpenBodies, Serving } from './serving.ts';
import { Ui } from './ui.ts';

/** How long `untilPaired` waits by default. */
const PAIR_TIMEOUT_MS = 60_000;
/** A proxy that is serving. Close it: its sockets keep the process alive. */
export class PdProxy {
  readonly #config: ProxyConfig;
  readonly #log: Logger;
  readonly #registry: InstanceRegistry;
  readonly #caches: PromptCaches;
  readonly #coordinator: Coordinator;
  /** What clients ask of the proxy itself, and where it is one process, everything. */
  readonly #serving: Serving;
  readonly #models: ModelDirectory;
  readonly #ui: Ui | undefined;
  readonly #stop = new AbortController();
  readonly #pseudonym = `pd-proxy-${randomBytes(8).toString('hex')}`;
  /** Of a proxy of several processes. */
  #relays: Relays | undefined;
  #discovery: Discovery | undefined;
  #etcd: EtcdInstances | undefined;
  #named: NamedInstances | undefined;
  #probes: Probes | undefined;
  #http: HostPort | undefined;
  /** `instances`: one has come or gone. */
  readonly #events = new EventEmitter<{ instances: [] }>();
  #draining = false;
  #closing: Promise<void> | undefined;

  /** `tokenizer`: its digest, where there is one. */
  private constructor(config: ProxyConfig, tokenizer: string | undefined, openBodies?: OpenBodies) {
    this.#config = config;
    const log = createLogger(config.log, 'proxy');
    this.#log = log;
    const { allowInstances, instances } = config;
    if (config.upstream?.keyFile !== undefined && allowInstances === undefined && instances.length === 0) {
      const why = 'anybody may ping, and would get that key';
      throw new PdError('CONFIG_INVALID', `--worker-key-file needs --allow-instances or --instances: ${why}`);
    }
    const { policy, prefillPolicy = policy, decodePolicy = policy } = config;
    const policies = { producer: prefillPolicy, consumer: decodePolicy };
    const registry = new InstanceRegistry(config.instanceTimeoutMs, undefined, policies);
    this.#registry = registry;
    const metrics = createProxyMetrics({
      instances: registry,
      cachedBlocks: () => caches.size,
      queued: () => admission.queued,
    });
    const caches = new PromptCaches(config, log, metrics, tokenizer);
    this.#caches = caches;
    const { maxRunning, maxRunningTokens, maxQueued, queueTimeoutMs, workers } = config;
    const admission = new Admission(
      { requests: maxRunning, tokens: maxRunningTokens, queued: maxQueued, waitMs: queueTimeoutMs },
      (reason) => metrics.turnedAway.inc({ reason }),
    );
    const coordinator = new LocalCoordinator({ config, registry, caches, admission, metrics });
    this.#coordinator = coordinator;
    const pseudonym = this.#pseudonym;
    const behindRelays = workers > 1;
    const serving = new Serving({ config, log, metrics, coordinator, pseudonym, behindRelays, openBodies });
    this.#serving = serving;
    setMaxListeners(0, this.#stop.signal, this.#events); // one per caller who waits
    const models = new ModelDirectory(registry, serving.upstream, log, this.#stop.signal);
    this.#models = models;
    const about = new AboutProxy({
      ...{ registry, caches, admission, serving, models },
      stop: this.#stop.signal,
      relays: () => this.#relays,
      draining: () => this.#draining,
    });
    about.attach();
    if (config.ui === 'off') return;
    this.#ui = new Ui({ config, log, keyed: serving.guard.keyed, snapshot: () => about.snapshot() });
    this.#ui.attach(serving.app);
  }

  /** Listens for pings and for requests. Throws PORT_IN_USE or ADDRESS_INVALID; of its tokenizer CHECKPOINT_INVALID or MODEL_UNSUPPORTED. */
  static start(config: ProxyConfig): Promise<PdProxy>;
  /** @internal `openBodies`: what reads bodies, for a test to replace. */
  static start(config: ProxyConfig, openBodies?: OpenBodies): Promise<PdProxy>;
  static async start(config: ProxyConfig, openBodies?: OpenBodies): Promise<PdProxy> {
    const { tokenizer: dir } = config;
    // Whole, though the thread loads its own: one that cannot be used is to be known before anybody asks.
    const digest = dir && (await (await import('../model/tokenizer.ts')).Tokenizer.load(dir)).digest;
    const proxy = new PdProxy(config, digest, openBodies);
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
    const { instanceTimeoutMs, allowInstances, instances, upstream, registry: etcd } = this.#config;
    // Of several processes those that relay make them.
    if (this.#config.workers === 1) await this.#serving.openTraces();
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
      onBadPing: () => this.#serving.metrics.badPings.inc(),
      onChange: (change) => {
        this.#relays?.instanceChanged(change);
        this.#models.forget(change.instance.httpAddress);
        this.#caches.changed(change);
        this.#events.emit('instances');
      },
    });
    if (instances.length > 0) {
      const discovery = this.#discovery;
      this.#named = new NamedInstances({
        instances,
        upstream: this.#serving.upstream,
        needsTls: upstream?.ca !== undefined,
        log: this.#log,
        intervalMs: Math.min(1_000, Math.ceil(instanceTimeoutMs / 4)),
        take: (ping, reached) => discovery.takeNamed(ping, reached),
      });
    }
    if (etcd) this.#etcd = new EtcdInstances(new Etcd(etcd), this.#log, this.#discovery);
    const { healthIntervalMs: intervalMs } = this.#config;
    if (intervalMs > 0) {
      this.#probes = new Probes(this.#registry, this.#serving.upstream, this.#log, intervalMs);
    }
    const port = this.#config.workers > 1 ? await this.#listenApart(http) : await this.#listenAlone(http);
    this.#http = { host: http.host, port };
    this.#log.info(`Discovery on tcp://${reachableAt(this.#discovery.address)}`);
    this.#log.info(`Running on http${this.#serving.guard.https ? 's' : ''}://${reachableAt(this.#http)}`);
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
    this.#relays = await Relays.create({
      config: this.#config,
      coordinator: this.#coordinator,
      log: this.#log,
      pseudonym: this.#pseudonym,
      instances: () => this.instances,
    });
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
    await this.#etcd?.close();
    this.#named?.close();
    await this.#discovery?.close();
    this.#caches.close();
    this.#probes?.close();
    await this.#serving.close();
    await this.#relays?.close();
    if (started) this.#log.info('Stopped');
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
