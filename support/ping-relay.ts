/** For workers that ping one address: it passes their pings on to several proxies. */
import { Dealer, Router } from 'zeromq';

/** Close it. */
export class PingRelay {
  /** `ip:port` for the workers. */
  readonly address: string;
  readonly #router: Router;
  readonly #discoveries: readonly string[];
  /** By worker, one for each proxy. */
  readonly #dealers = new Map<string, readonly Dealer[]>();

  private constructor(router: Router, discoveries: readonly string[]) {
    this.#router = router;
    this.#discoveries = discoveries;
    this.address = router.lastEndpoint!.replace('tcp://', '');
    void this.#pass();
  }

  /** `discoveries`: `ip:port` of each proxy. */
  static async open(discoveries: readonly string[]): Promise<PingRelay> {
    const router = new Router({ linger: 0, handover: true });
    await router.bind('tcp://127.0.0.1:*');
    return new PingRelay(router, discoveries);
  }

  close(): void {
    this.#router.close();
    for (const dealer of [...this.#dealers.values()].flat()) dealer.close();
  }

  async #pass(): Promise<void> {
    for await (const [worker, body] of this.#router) {
      if (!worker || !body) continue;
      for (const dealer of this.#dealersOf(worker)) dealer.send(body).catch(() => {}); // that proxy is away
    }
  }

  #dealersOf(worker: Buffer): readonly Dealer[] {
    const routingId = worker.toString('latin1');
    const known = this.#dealers.get(routingId);
    if (known) return known;
    const dealers = this.#discoveries.map((discovery) => {
      const dealer = new Dealer({
        routingId,
        linger: 0,
        immediate: true,
        sendHighWaterMark: 1,
        sendTimeout: 0,
      });
      dealer.connect(`tcp://${discovery}`);
      return dealer;
    });
    this.#dealers.set(routingId, dealers);
    return dealers;
  }
}
