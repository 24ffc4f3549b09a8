/** Looks at every instance's GET /health: one may ping on while its HTTP server hangs. */
import { isWell } from '../net/http.ts';
import type { Logger } from '../observability/log.ts';
import { type Instance, type InstanceRegistry, instanceLabel } from './registry.ts';
import type { Upstream } from './upstream.ts';

const DEADLINE_MS = 2_000;
/** Looks in a row that fail before an instance is let alone. */
const FAILURES = 3;

/** Close it. */
export class Probes {
  readonly #registry: InstanceRegistry;
  readonly #upstream: Upstream;
  readonly #log: Logger;
  readonly #intervalMs: number;
  /** By HTTP address: failures in a row. */
  readonly #failures = new Map<string, number>();
  readonly #looking = new Set<string>();
  readonly #timer: NodeJS.Timeout;
  readonly #stop = new AbortController();

  constructor(registry: InstanceRegistry, upstream: Upstream, log: Logger, intervalMs: number) {
    this.#registry = registry;
    this.#upstream = upstream;
    this.#log = log;
    this.#intervalMs = intervalMs;
    this.#timer = setInterval(() => this.#round(), intervalMs).unref();
  }

  close(): void {
    clearInterval(this.#timer);
    this.#stop.abort();
  }

  #round(): void {
    const instances = this.#registry.list();
    const known = new Set(instances.map(({ httpAddress }) => httpAddress));
    for (const address of this.#failures.keys()) if (!known.has(address)) this.#failures.delete(address);
    for (const instance of instances) if (!this.#looking.has(instance.httpAddress)) void this.#look(instance);
  }

  async #look(instance: Instance): Promise<void> {
    const [registry, log] = [this.#registry, this.#log];
    const { httpAddress } = instance;
    this.#looking.add(httpAddress);
    const well = await this.#asks(instance);
    this.#looking.delete(httpAddress);
    if (this.#stop.signal.aborted) return;
    const before = this.#failures.get(httpAddress) ?? 0;
    if (well) {
      if (before >= FAILURES) {
        log.info(`${instanceLabel(instance)} (${instance.role}) answers GET /health again`);
        registry.standing(instance)?.breaker.mayTry();
      }
      this.#failures.delete(httpAddress);
      return;
    }
    this.#failures.set(httpAddress, before + 1);
    if (before + 1 < FAILURES) return;
    if (before + 1 === FAILURES) {
      const why = `has not answered GET /health ${FAILURES} times in a row: others are preferred`;
      log.warn({ role: instance.role }, `${instanceLabel(instance)} (${instance.role}) ${why}`);
    }
    registry.standing(instance)?.breaker.open(2 * (this.#intervalMs + DEADLINE_MS));
  }

  async #asks(instance: Instance): Promise<boolean> {
    const stop = this.#stop.signal;
    try {
      const { response } = await this.#upstream.inquire(instance, '/health', DEADLINE_MS, { stop });
      return isWell(response.statusCode);
    } catch {
      return false;
    }
  }
}
