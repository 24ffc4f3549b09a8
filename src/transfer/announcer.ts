/**
 * Announces this instance to its proxies: by a heartbeat (ping.ts) for every address of each of them, and in etcd where that is configured. A name stands for all its addresses, those
 * of a headless Service for example, and is looked up again and again, since they change.
 */
import { isIP } from 'node:net';
import { formatHostPort, type HostPort } from '../net/address.ts';
import { Etcd } from '../net/etcd.ts';
import { addressesOf, isLocalhost, reasonOf } from '../net/resolve.ts';
import { RateLimitedLog } from '../observability/log.ts';
import { encodePing } from '../wire/codec.ts';
import type { PingMessage, WorkerLoad } from '../wire/messages.ts';
import { EtcdRegistration } from './etcd-registration.ts';
import { pingOf } from './hello.ts';
import { type PingContext, Pinger } from './ping.ts';
import type { ProxyPing } from './types.ts';

/** Between two lookups of a proxy's name. */
const LOOKUP_MS = 10_000;
/** While a name has no address that is told again so often. */
const AGAIN_MS = 600_000;

interface Heartbeat {
  readonly pinger: Pinger;
  /** The proxies, as they were given, that have this address. */
  readonly of: Set<HostPort>;
}

export class Announcer {
  readonly #context: PingContext;
  readonly #ping: ProxyPing;
  readonly #lookUp: typeof addressesOf;
  readonly #message: PingMessage;
  #body: Uint8Array;
  /** By address. */
  readonly #heartbeats = new Map<string, Heartbeat>();
  readonly #timer: NodeJS.Timeout | undefined;
  readonly #namelessLog = new RateLimitedLog(AGAIN_MS);
  readonly #registration: EtcdRegistration | undefined;
  #closed = false;

  constructor(context: PingContext, ping: ProxyPing, lookUp = addressesOf, lookUpMs = LOOKUP_MS) {
    const { options, self } = context;
    this.#context = context;
    this.#ping = ping;
    this.#lookUp = lookUp;
    this.#message = pingOf(options, self, ping);
    this.#body = encodePing(this.#message);
    const { registry, httpAddress } = ping;
    this.#registration =
      registry &&
      new EtcdRegistration({
        etcd: new Etcd(registry),
        key: httpAddress,
        ping: () => this.#body,
        log: context.log,
      });
    const names: HostPort[] = [];
    for (const proxy of ping.proxies) {
      if (isIP(proxy.host.replace(/%.*$/, '')) === 0) names.push(proxy);
      else this.#beat(proxy, proxy);
    }
    for (const name of names) void this.#find(name);
    const changing = names.filter(({ host }) => !isLocalhost(host));
    if (changing.length > 0)
      this.#timer = setInterval(() => changing.forEach((name) => void this.#find(name)), lookUpMs);
  }

  /** Pings at once, and says the load in all that follow. An engine without a fingerprint announces itself as vLLM does, and says none. */
  tell(load: WorkerLoad): void {
    const { native } = this.#message;
    if (!native) return;
    this.#body = encodePing({ ...this.#message, native: { ...native, load } });
    for (const { pinger } of this.#heartbeats.values()) pinger.ping();
  }

  /** Resolves once etcd, if any, has been told. Idempotent. */
  async close(): Promise<void> {
    this.#closed = true;
    clearInterval(this.#timer);
    for (const { pinger } of this.#heartbeats.values()) pinger.close();
    this.#heartbeats.clear();
    await this.#registration?.close();
  }

  async #find(name: HostPort): Promise<void> {
    let hosts: readonly string[];
    try {
      hosts = (await this.#lookUp(name.host)).map(({ address }) => address);
    } catch (error) {
      // What was found before stays: a name server that fails says nothing of the proxies.
      this.#nameless(name, reasonOf(error));
      return;
    }
    if (this.#closed) return;
    for (const host of hosts) this.#beat({ host, port: name.port }, name);
    for (const [address, { pinger, of }] of this.#heartbeats) {
      if (!of.has(name) || hosts.some((host) => formatHostPort({ host, port: name.port }) === address))
        continue;
      // One that still takes pings is no longer listed, perhaps as it drains: it is left when it goes.
      if (pinger.reached) continue;
      of.delete(name);
      if (of.size > 0) continue;
      pinger.close();
      this.#heartbeats.delete(address);
      this.#context.log.info(
        { proxy: address },
        `${name.host} no longer has the address ${address}: no pings to it`,
      );
    }
  }

  #beat(address: HostPort, of: HostPort): void {
    const key = formatHostPort(address);
    const known = this.#heartbeats.get(key);
    if (known) {
      known.of.add(of);
      return;
    }
    const { type, httpAddress, intervalMs } = this.#ping;
    const messages = {
      type,
      httpAddress,
      intervalMs,
      body: () => this.#body,
      heardBy: (other: Pinger) => this.#heardBy(other),
    };
    const pinger = new Pinger(this.#context, messages, address);
    this.#heartbeats.set(key, { pinger, of: new Set([of]) });
  }

  #heardBy(other: Pinger): 'address' | 'proxy' | undefined {
    const all = [...this.#heartbeats.values()];
    const own = all.find(({ pinger }) => pinger === other);
    const hearing = all.filter(({ pinger }) => pinger !== other && pinger.reached);
    if (hearing.some(({ of }) => own && [...of].some((proxy) => own.of.has(proxy)))) return 'address';
    return hearing.length > 0 ? 'proxy' : undefined;
  }

  #nameless(name: HostPort, why: string): void {
    if (this.#closed) return;
    const proxy = formatHostPort(name);
    this.#namelessLog.log(proxy, (suppressed) =>
      this.#context.log.warn(
        { proxy, code: 'PEER_UNREACHABLE', reason: 'nameless', suppressed },
        `proxy ${proxy} cannot be reached: its name has no address (${why}). It is looked up again every ${LOOKUP_MS / 1_000} s`,
      ),
    );
  }
}
