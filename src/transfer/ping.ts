/** The heartbeat by which a proxy finds this instance. No answer is expected; a proxy that is away is told about once, and met again. */
import * as zmq from 'zeromq';
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort, type HostPort, zmqEndpoint } from '../net/address.ts';
import { encodePing } from '../wire/codec.ts';
import { PD_VERSION } from '../wire/messages.ts';
import type { TransferContext } from './context.ts';
import type { ProxyPing } from './types.ts';

export class Pinger {
  readonly #context: TransferContext;
  readonly #ping: ProxyPing;
  /** Addresses of the proxy, one of which pings go to. */
  readonly #proxies: readonly HostPort[];
  #at = 0;
  readonly #body: Uint8Array;
  readonly #socket: zmq.Dealer;
  readonly #timer: NodeJS.Timeout;
  #state: 'new' | 'reached' | 'away' = 'new';
  #busy = false;
  #closed = false;

  constructor(context: TransferContext, ping: ProxyPing) {
    const { options, self } = context;
    this.#context = context;
    this.#ping = ping;
    const { host, port, otherHosts = [] } = ping.proxy;
    this.#proxies = [host, ...otherHosts].map((one) => asDestination({ host: one, port }));
    const { fingerprint } = options;
    const ours = fingerprint && {
      version: PD_VERSION,
      digest: fingerprint.digest,
      model: fingerprint.model,
      sendType: options.sendType,
      ...(ping.features && { features: ping.features }),
    };
    const message = { type: ping.type, http_address: ping.httpAddress, zmq_address: self } as const;
    this.#body = encodePing(ours ? { ...message, ours } : message);
    // One ping waits at most, and none for a proxy that is away: it would read stale ones when it returns.
    this.#socket = new zmq.Dealer({
      routingId: self,
      linger: 0,
      immediate: true,
      sendHighWaterMark: 1,
      sendTimeout: Math.max(Math.floor(ping.intervalMs / 2), 1),
      ipv6: true,
      reconnectInterval: 100,
      reconnectMaxInterval: 1_000,
    });
    this.#socket.connect(this.#endpoint);
    void this.#send();
    this.#timer = setInterval(() => void this.#send(), ping.intervalMs);
  }

  /** Idempotent. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    clearInterval(this.#timer);
    this.#socket.close();
  }

  get #proxy(): string {
    return formatHostPort(this.#proxies[this.#at]!);
  }

  get #endpoint(): string {
    return zmqEndpoint(this.#proxies[this.#at]!);
  }

  async #send(): Promise<void> {
    if (this.#busy || this.#closed) return;
    this.#busy = true;
    try {
      await this.#socket.send(this.#body);
      this.#reached();
    } catch (error) {
      if (!this.#closed) this.#next(PdError.from(error));
    } finally {
      this.#busy = false;
    }
  }

  #reached(): void {
    const { log } = this.#context;
    const { type, httpAddress } = this.#ping;
    if (this.#state === 'new') {
      log.info({ proxy: this.#proxy, type, httpAddress }, `first ping sent to proxy ${this.#proxy}`);
    } else if (this.#state === 'away') {
      log.info({ proxy: this.#proxy }, `proxy ${this.#proxy} is reached again`);
    }
    this.#state = 'reached';
  }

  /** To the next address; the proxy is away once none has taken a ping. */
  #next(error: PdError): void {
    if (this.#at === this.#proxies.length - 1) this.#away(error);
    if (this.#proxies.length === 1) return;
    this.#socket.disconnect(this.#endpoint);
    this.#at = (this.#at + 1) % this.#proxies.length;
    this.#socket.connect(this.#endpoint);
  }

  #away(error: PdError): void {
    const { log, limited } = this.#context;
    const changed = this.#state !== 'away';
    this.#state = 'away';
    const write = (suppressed: number) =>
      log.warn(
        { proxy: this.#proxy, suppressed },
        `proxy ${this.#proxy} cannot be reached (${error.message}): no request will come from it; trying again`,
      );
    if (changed) limited.log(`proxy ${this.#proxy}`, write);
  }
}
