/**
 * Instances that register with etcd (transfer/etcd-registration.ts): keys with a lease, whose values are pings. What is there is announced again
 * and again, as pings are, for as long as etcd does not say that it has gone: an etcd that is away takes no instance with it.
 */
import { setTimeout } from 'node:timers/promises';
import { PdError } from '../errors.ts';
import type { Etcd } from '../net/etcd.ts';
import { plural } from '../observability/bytes.ts';
import type { Logger } from '../observability/log.ts';
import type { Discovery } from './discovery.ts';

/** Between two announcements of the same instance. */
const AGAIN_MS = 1_000;
/** Everything is listed anew so often, whatever news there was. */
const LIST_MS = 30_000;
/** Before the next try: doubles up to the second. */
const [FIRST_PAUSE_MS, LONGEST_PAUSE_MS] = [200, 5_000];
/** Anybody who may write to etcd could fill this. */
const MOST_INSTANCES = 4_096;

export class EtcdInstances {
  readonly #etcd: Etcd;
  readonly #log: Logger;
  readonly #discovery: Pick<Discovery, 'take' | 'takeAgain' | 'drop'>;
  /** By key. */
  readonly #pings = new Map<string, Uint8Array>();
  readonly #stop = new AbortController();
  readonly #again: NodeJS.Timeout;
  readonly #following: Promise<void>;
  /** Undefined: not known yet. */
  #reached: boolean | undefined;

  constructor(etcd: Etcd, log: Logger, discovery: Pick<Discovery, 'take' | 'takeAgain' | 'drop'>) {
    this.#etcd = etcd;
    this.#log = log;
    this.#discovery = discovery;
    this.#again = setInterval(() => {
      for (const [key, ping] of this.#pings) this.#put(key, ping);
    }, AGAIN_MS);
    this.#following = this.#follow();
  }

  async close(): Promise<void> {
    clearInterval(this.#again);
    this.#stop.abort();
    await this.#following;
  }

  async #follow(): Promise<void> {
    const { signal } = this.#stop;
    let pauseMs = FIRST_PAUSE_MS;
    while (!signal.aborted) {
      try {
        await this.#once(signal);
        pauseMs = FIRST_PAUSE_MS;
      } catch (error) {
        if (signal.aborted) return;
        this.#tell(false, PdError.from(error));
        pauseMs = Math.min(2 * pauseMs, LONGEST_PAUSE_MS);
      }
      await setTimeout(pauseMs, undefined, { signal }).catch(() => {});
    }
  }

  /** Lists what is there, then follows the news until it ends, or is old enough to be listed anew. */
  async #once(signal: AbortSignal): Promise<void> {
    const { entries, revision } = await this.#etcd.list(signal);
    for (const key of [...this.#pings.keys()]) if (!entries.has(key)) this.#delete(key);
    for (const [key, ping] of entries) this.#put(key, ping);
    this.#tell(true);
    const old = AbortSignal.timeout(LIST_MS);
    try {
      for await (const changes of this.#etcd.watch(revision + 1n, AbortSignal.any([signal, old]))) {
        for (const change of changes) {
          if (change.kind === 'put') this.#put(change.key, change.value);
          else this.#delete(change.key);
        }
      }
    } catch (error) {
      if (!old.aborted) throw error;
    }
  }

  #put(key: string, ping: Uint8Array): void {
    const known = this.#pings.get(key);
    if (!known && this.#pings.size >= MOST_INSTANCES) return;
    this.#pings.set(key, ping);
    const news = !known || Buffer.compare(known, ping) !== 0;
    const taken = news ? this.#discovery.take(ping) : this.#discovery.takeAgain(ping);
    // It would be refused again every second.
    if (!taken) this.#pings.delete(key);
  }

  #delete(key: string): void {
    const ping = this.#pings.get(key);
    if (!ping) return;
    this.#pings.delete(key);
    this.#discovery.drop(ping);
  }

  #tell(reached: boolean, error?: PdError): void {
    if (this.#reached === reached) return;
    this.#reached = reached;
    const log = this.#log;
    const known = plural(this.#pings.size, 'instance');
    if (reached) log.info(`instances are read from ${this.#etcd}: ${known} there`);
    else
      log.warn({ code: error?.code }, `${error?.message}. What is known of ${known} is kept; trying again`);
  }
}
