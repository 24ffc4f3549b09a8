/**
 * Announces a server that does not ping by itself, or cannot reach the proxies (`pd-proxy register`): as a worker of vLLM would, and for as long as its
 * GET /health is answered.
 */
import { setTimeout } from 'node:timers/promises';
import { formatHostPort, type HostPort, httpUrl } from '../net/address.ts';
import { ask, isWell } from '../net/http.ts';
import { reasonOf } from '../net/resolve.ts';
import { type Logger, RateLimitedLog } from '../observability/log.ts';
import { Announcer } from './announcer.ts';
import { Deadlines } from './deadlines.ts';
import type { ProxyPing } from './types.ts';

/** For an answer to GET /health. */
const DEADLINE_MS = 2_000;
/** Looks in a row that fail before the pings end: one that is busy for a moment is not gone. */
const FAILURES = 2;

export interface OnBehalfOptions extends Pick<ProxyPing, 'type' | 'proxies' | 'registry' | 'intervalMs'> {
  /** Of the server, as proxies reach it: addresses, no names. */
  readonly http: HostPort;
  /** Where it takes KV, as its peers reach it. */
  readonly kv: HostPort;
  readonly log: Logger;
}

export class OnBehalf {
  readonly #options: OnBehalfOptions;
  readonly #stop = new AbortController();
  readonly #watching: Promise<void>;
  #announcer: Announcer | undefined;
  /** In a row; undefined: it has not been looked at yet. */
  #failures: number | undefined;

  constructor(options: OnBehalfOptions) {
    this.#options = options;
    this.#watching = this.#watch();
  }

  /** No pings any more; resolves once etcd, if any, has been told. Idempotent. */
  async close(): Promise<void> {
    this.#stop.abort();
    await this.#watching;
    await this.#announcer?.close();
    this.#announcer = undefined;
  }

  async #watch(): Promise<void> {
    const { signal } = this.#stop;
    while (!signal.aborted) {
      const why = await this.#look();
      if (signal.aborted) return;
      if (why !== undefined) await this.#unwell(why);
      else if (!this.#announcer) this.#announcer = this.#announce();
      if (why === undefined) this.#failures = 0;
      await setTimeout(this.#options.intervalMs, undefined, { signal }).catch(() => {});
    }
  }

  /** Why it is not well, if it is not. */
  async #look(): Promise<string | undefined> {
    try {
      const { status } = await ask(`${httpUrl(this.#options.http)}/health`, DEADLINE_MS);
      return isWell(status) ? undefined : `GET /health is answered with status ${status}`;
    } catch (error) {
      const late = error instanceof DOMException && error.name === 'TimeoutError';
      return late ? `GET /health is not answered within ${DEADLINE_MS} ms` : reasonOf(error);
    }
  }

  #announce(): Announcer {
    const { type, http, kv, proxies, registry, intervalMs, log } = this.#options;
    const httpAddress = formatHostPort(http);
    log.info(
      { type, httpAddress },
      `${httpAddress} is well: it is announced with KV at ${formatHostPort(kv)}`,
    );
    return new Announcer(
      {
        // Nothing is known of its model, nor of how it sends.
        options: { sendType: 'PUT' },
        self: formatHostPort(kv),
        deadlines: new Deadlines(),
        log,
        limited: new RateLimitedLog(),
      },
      { type, httpAddress, proxies, intervalMs, ...(registry && { registry }) },
    );
  }

  async #unwell(why: string): Promise<void> {
    const first = this.#failures === undefined;
    this.#failures = (this.#failures ?? 0) + 1;
    const { http, log } = this.#options;
    const address = formatHostPort(http);
    const announcer = this.#announcer;
    if (announcer && this.#failures >= FAILURES) {
      this.#announcer = undefined;
      log.warn(
        { code: 'PEER_UNREACHABLE' },
        `${address} is not well: ${why}. It is announced no more until it is`,
      );
      await announcer.close();
    } else if (first) {
      log.warn(
        { code: 'PEER_UNREACHABLE' },
        `${address} is not well yet: ${why}. It is announced as soon as it is`,
      );
    }
  }
}
