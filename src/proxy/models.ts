/** Which models the instances serve, by their own /v1/models: for pairing, and for the proxy's own list. */
import { reasonOf } from '../net/resolve.ts';
import type { Logger } from '../observability/log.ts';
import { type Instance, type InstanceRegistry, instanceLabel } from './registry.ts';
import type { Upstream } from './upstream.ts';

/** An entry of OpenAI's model list; whatever else an instance says about a model passes through. */
export interface ModelEntry {
  readonly id: string;
  readonly [key: string]: unknown;
}

interface Known {
  readonly models: readonly ModelEntry[];
  readonly atMs: number;
}

const DEADLINE_MS = 2_000;
/** A list older than this is asked for again when a client asks. */
const FRESH_MS = 5_000;
/** And this often without a client asking, as long as the instance pings: adapters come and go. */
const REFRESH_MS = 30_000;
const MAX_BODY = 4 * 1024 * 1024;

export class ModelDirectory {
  readonly #known = new Map<string, Known>();
  readonly #asking = new Map<string, Promise<void>>();
  readonly #registry: InstanceRegistry;
  readonly #upstream: Upstream;
  readonly #log: Logger;
  readonly #stop: AbortSignal;

  /** `stop`: aborted when the proxy stops. */
  constructor(registry: InstanceRegistry, upstream: Upstream, log: Logger, stop: AbortSignal) {
    this.#registry = registry;
    this.#upstream = upstream;
    this.#log = log;
    this.#stop = stop;
  }

  /** On each ping: asks an instance that is new, or whose list is old. */
  onPing(httpAddress: string): void {
    const instance = this.#registry.list().find((known) => known.httpAddress === httpAddress);
    if (instance && this.#ageOf(httpAddress) > REFRESH_MS) void this.#ask(instance);
  }

  forget(httpAddress: string): void {
    this.#known.delete(httpAddress);
  }

  /** The union over all consumers, each model once, in the order of first mention. */
  async list(): Promise<readonly ModelEntry[]> {
    const consumers = this.#registry.list('consumer');
    const old = consumers.filter((instance) => this.#ageOf(instance.httpAddress) > FRESH_MS);
    await Promise.all(old.map((instance) => this.#ask(instance)));
    const models = new Map<string, ModelEntry>();
    for (const { httpAddress } of consumers) {
      for (const model of this.#known.get(httpAddress)?.models ?? []) {
        if (!models.has(model.id)) models.set(model.id, model);
      }
    }
    return [...models.values()];
  }

  #ageOf(httpAddress: string): number {
    const known = this.#known.get(httpAddress);
    return known ? performance.now() - known.atMs : Number.POSITIVE_INFINITY;
  }

  /** One question at a time per instance; a failure leaves what was known. */
  #ask(instance: Instance): Promise<void> {
    const address = instance.httpAddress;
    const running = this.#asking.get(address);
    if (running) return running;
    const asking = this.#fetch(instance)
      .then((models) => {
        const ids = models.map((model) => model.id);
        if (this.#registry.setModels(address, ids))
          this.#known.set(address, { models, atMs: performance.now() });
      })
      .catch((error: unknown) => {
        this.#log.debug(`GET /v1/models of ${instanceLabel(instance)}: ${reasonOf(error)}`);
      })
      .finally(() => this.#asking.delete(address));
    this.#asking.set(address, asking);
    return asking;
  }

  async #fetch(instance: Instance): Promise<readonly ModelEntry[]> {
    const asked = { most: MAX_BODY, stop: this.#stop };
    const { response, body } = await this.#upstream.inquire(instance, '/v1/models', DEADLINE_MS, asked);
    if (response.statusCode !== 200) throw new Error(`status ${response.statusCode}`);
    const { data } = JSON.parse(body.toString('utf8')) as { data?: unknown };
    if (!Array.isArray(data)) throw new Error('the list has no "data"');
    return data.filter(
      (entry: unknown): entry is ModelEntry =>
        typeof entry === 'object' && entry !== null && typeof (entry as { id?: unknown }).id === 'string',
    );
  }
}
