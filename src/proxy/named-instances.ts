/**
 * Instances that this proxy is told of (`--instances`), so that they need not ping. A pd-worker says itself what it is, over `GET /instance`, as its
 * ping would; a server that is not ours is there for as long as its `GET /health` answers. Each answer is taken as a ping, so one that gives none goes as
 * one goes that does not ping.
 */
import { isIP } from 'node:net';
import type { NamedInstance } from '../config/kinds.ts';
import { PdError } from '../errors.ts';
import { formatHostPort, type HostPort } from '../net/address.ts';
import { isWell } from '../net/http.ts';
import { addressesOf, reasonOf } from '../net/resolve.ts';
import { type Logger, RateLimitedLog } from '../observability/log.ts';
import { readPing } from '../wire/codec.ts';
import type { PingMessage } from '../wire/messages.ts';
import type { Reached } from './discovery.ts';
import { type Instance, instanceUrl } from './registry.ts';
import type { Upstream } from './upstream.ts';

/** For an answer. */
const DEADLINE_MS = 2_000;
const MOST_BYTES = 65_536;
/** Between two lookups of a name. */
const LOOKUP_MS = 10_000;

export interface NamedInstancesOptions {
  readonly instances: readonly NamedInstance[];
  readonly upstream: Pick<Upstream, 'inquire'>;
  /** They are asked by TLS, whatever their names say. */
  readonly needsTls: boolean;
  readonly log: Logger;
  /** Between two questions to the same instance. */
  readonly intervalMs: number;
  readonly take: (ping: PingMessage, reached: Reached) => boolean;
}

/** One address of what was named. */
interface Target {
  readonly reached: Reached;
  asking: boolean;
  /** Absent: it has not been asked yet. */
  well?: boolean;
  /** Why it is not well. */
  why?: string;
  /** The HTTP address that it announces. */
  as?: string;
}

/** What was named, as it was given. */
interface Named {
  readonly given: NamedInstance;
  /** By address. */
  readonly targets: Map<string, Target>;
  /** Of a server that is not ours: where its KV is, once known. */
  kv?: HostPort;
  /** Why it does not answer, as the log says; empty: it does. Absent: the log says nothing yet. */
  told?: string;
}

function whyOf(error: unknown): string {
  if (error instanceof DOMException && error.name === 'TimeoutError')
    return `no answer within ${DEADLINE_MS} ms`;
  const cause = error instanceof PdError ? (error.cause ?? error) : error;
  // What OpenSSL says of it is no help.
  if ((cause as NodeJS.ErrnoException).code === 'ERR_SSL_WRONG_VERSION_NUMBER') return 'it speaks no TLS';
  return reasonOf(cause);
}

/** Close it. */
export class NamedInstances {
  readonly #options: NamedInstancesOptions;
  readonly #lookUp: typeof addressesOf;
  readonly #named: readonly Named[];
  /** Which address an instance is reached at, where several lead to it: by the HTTP address that it announces. */
  readonly #ways = new Map<string, Target>();
  readonly #stop = new AbortController();
  readonly #limited = new RateLimitedLog();
  readonly #timers: readonly NodeJS.Timeout[];

  constructor(options: NamedInstancesOptions, lookUp = addressesOf, lookUpMs = LOOKUP_MS) {
    this.#options = options;
    this.#lookUp = lookUp;
    this.#named = options.instances.map((given) => ({ given, targets: new Map() }));
    const names = this.#named.filter(({ given: { http, told } }) =>
      [http, ...(told ? [told.kv] : [])].some(({ host }) => isIP(host) === 0),
    );
    for (const one of this.#named) void this.#find(one);
    this.#timers = [
      setInterval(() => this.#round(), options.intervalMs),
      ...(names.length > 0
        ? [setInterval(() => names.forEach((one) => void this.#find(one)), lookUpMs)]
        : []),
    ];
  }

  close(): void {
    this.#stop.abort();
    for (const timer of this.#timers) clearInterval(timer);
  }

  /** Looks up where it is, and asks whatever is new. */
  async #find(named: Named): Promise<void> {
    const { http, tls, told } = named.given;
    let found: readonly string[];
    try {
      found = (await this.#lookUp(http.host)).map(({ address }) => address);
      // A server that is not ours is one, whatever its name says.
      if (told) found = found.slice(0, 1);
      if (told) named.kv = { host: (await this.#lookUp(told.kv.host))[0]!.address, port: told.kv.port };
    } catch (error) {
      // What was found before stays: a name server that fails says nothing of the instances.
      if (named.targets.size === 0) this.#tell(named, `its name has no address (${reasonOf(error)})`);
      return;
    }
    if (this.#stop.signal.aborted) return;
    for (const host of found) {
      const at = { host, port: http.port };
      const key = formatHostPort(at);
      if (named.targets.has(key)) continue;
      const target = { reached: { at, tls: tls || this.#options.needsTls }, asking: false };
      named.targets.set(key, target);
      void this.#ask(named, target);
    }
    // One that still answers is no longer listed, perhaps as it drains: it is left when it goes.
    for (const [key, { reached, well }] of named.targets)
      if (well === false && !found.includes(reached.at.host)) named.targets.delete(key);
  }

  #round(): void {
    for (const named of this.#named) {
      for (const target of named.targets.values()) if (!target.asking) void this.#ask(named, target);
    }
  }

  async #ask(named: Named, target: Target): Promise<void> {
    target.asking = true;
    try {
      const ping = named.given.told ? await this.#health(named, target) : await this.#instance(target);
      target.well = true;
      if (this.#stop.signal.aborted || !this.#leads(target, ping.http_address)) return;
      target.well = this.#options.take(ping, target.reached);
      if (!target.well) target.why = 'what it says cannot be used';
    } catch (error) {
      target.well = false;
      target.why = whyOf(error);
    } finally {
      target.asking = false;
    }
    if (this.#stop.signal.aborted) return;
    const targets = [...named.targets.values()];
    if (target.well) this.#tell(named, '');
    else if (targets.every(({ well }) => well === false)) this.#tell(named, (targets[0] ?? target).why!);
  }

  /** It is by this address that the instance is reached, not by another that leads to the same. */
  #leads(target: Target, httpAddress: string): boolean {
    const other = this.#ways.get(httpAddress);
    if (other !== target && other?.well) return false;
    const { as: before } = target;
    if (before !== undefined && this.#ways.get(before) === target) this.#ways.delete(before);
    target.as = httpAddress;
    this.#ways.set(httpAddress, target);
    return true;
  }

  /** What a worker of ours says of itself. */
  async #instance({ reached }: Target): Promise<PingMessage> {
    const { response, body } = await this.#get('/instance', 'producer', reached, MOST_BYTES);
    const { statusCode } = response;
    if (statusCode === 401) throw new Error('it needs a key: --worker-key-file has none that it knows');
    if (statusCode === 404) {
      const others = 'other servers are named as producer=HOST:PORT/KV_HOST:KV_PORT or consumer=...';
      throw new Error(`GET /instance is not known there, so it is no pd-worker of a pair; ${others}`);
    }
    if (statusCode !== 200) throw new Error(`GET /instance is answered with status ${statusCode}`);
    return readPing(JSON.parse(body.toString('utf8')));
  }

  /** What has been said of a server that is not ours, if it is well. */
  async #health({ given: { told }, kv }: Named, { reached }: Target): Promise<PingMessage> {
    const { role } = told!;
    const { response } = await this.#get('/health', role, reached);
    if (!isWell(response.statusCode))
      throw new Error(`GET /health is answered with status ${response.statusCode}`);
    const http_address = formatHostPort(reached.at);
    return { type: role === 'producer' ? 'P' : 'D', http_address, zmq_address: formatHostPort(kv!) };
  }

  #get(path: string, role: Instance['role'], { at, tls }: Reached, most?: number) {
    const httpAddress = formatHostPort(at);
    // Not known as an instance yet: all that is needed of one is where it is.
    const instance: Instance = {
      ...{ role, httpAddress, zmqAddress: '', http: at, url: instanceUrl(at, tls), zmq: at },
      lastSeenMs: 0,
    };
    const { upstream } = this.#options;
    return upstream.inquire(instance, path, DEADLINE_MS, { most, stop: this.#stop.signal });
  }

  /** `why` it does not answer; empty: it does. */
  #tell(named: Named, why: string): void {
    const { told } = named;
    if (told === why) return;
    const { log } = this.#options;
    const address = formatHostPort(named.given.http);
    const write = () => {
      named.told = why;
      if (why !== '')
        log.warn(
          { instance: address, code: 'PEER_UNREACHABLE' },
          `${address} (--instances) does not answer as an instance: ${why}. Asking again`,
        );
      // That it answers at first is told by its being added.
      else if (told !== undefined) log.info({ instance: address }, `${address} (--instances) answers now`);
    };
    // It may give another reason each time.
    if (told && why !== '') this.#limited.log(address, write);
    else write();
  }
}
