/**
 * Registers this instance with etcd: a key with a lease, whose value is what it would ping. The lease is kept alive; where it, or etcd, is lost,
 * the instance registers anew as soon as it can.
 */
import { setTimeout } from 'node:timers/promises';
import { PdError } from '../errors.ts';
import type { Etcd } from '../net/etcd.ts';
import type { Logger } from '../observability/log.ts';

/** The instance is forgotten so long after it has died. */
const LEASE_SECONDS = 10;
/** Between two signs of life: three fit into the lease. */
const BEAT_MS = 3_000;
/** After a failure. */
const PAUSE_MS = 1_000;
/** For the key to be taken back at the end. */
const LEAVE_MS = 1_000;

export interface EtcdRegistrationOptions {
  readonly etcd: Etcd;
  /** Below the prefix: the HTTP address. */
  readonly key: string;
  /** What it pings now. */
  readonly ping: () => Uint8Array;
  readonly log: Logger;
}

export class EtcdRegistration {
  readonly #options: EtcdRegistrationOptions;
  readonly #stop = new AbortController();
  readonly #staying: Promise<void>;
  #lease: string | undefined;
  #written: Uint8Array | undefined;
  #registered: boolean | undefined;

  constructor(options: EtcdRegistrationOptions) {
    this.#options = options;
    this.#staying = this.#stay();
  }

  /** Takes the key back, so that proxies send nothing more. Idempotent. */
  async close(): Promise<void> {
    if (this.#stop.signal.aborted) return await this.#staying;
    this.#stop.abort();
    await this.#staying;
    if (this.#lease === undefined) return;
    const { etcd, log } = this.#options;
    await etcd.revoke(this.#lease, AbortSignal.timeout(LEAVE_MS)).catch((error: unknown) => {
      log.info(
        `${etcd} was not told of the end: ${PdError.from(error).message}; the lease ends in ${LEASE_SECONDS} s`,
      );
    });
  }

  async #stay(): Promise<void> {
    const { signal } = this.#stop;
    while (!signal.aborted) {
      let pauseMs = BEAT_MS;
      try {
        await this.#beat(signal);
        this.#tell(true);
      } catch (error) {
        if (signal.aborted) return;
        this.#tell(false, PdError.from(error));
        pauseMs = PAUSE_MS;
      }
      await setTimeout(pauseMs, undefined, { signal }).catch(() => {});
    }
  }

  async #beat(signal: AbortSignal): Promise<void> {
    const { etcd, key, ping } = this.#options;
    if (this.#lease !== undefined && !(await etcd.keepAlive(this.#lease, signal))) this.#lease = undefined;
    if (this.#lease === undefined) {
      this.#written = undefined;
      this.#lease = await etcd.grant(LEASE_SECONDS, signal);
    }
    const body = ping();
    if (body === this.#written) return;
    try {
      await etcd.put(key, body, this.#lease, signal);
      this.#written = body;
    } catch (error) {
      // Where etcd has lost its data, it knows the lease no longer.
      this.#lease = undefined;
      throw error;
    }
  }

  #tell(registered: boolean, error?: PdError): void {
    if (this.#registered === registered) return;
    this.#registered = registered;
    const { log, etcd, key } = this.#options;
    if (registered) log.info({ key }, `registered with ${etcd} as ${key}`);
    else log.warn({ code: error?.code, key }, `not registered: ${error?.message}. Trying again`);
  }
}
