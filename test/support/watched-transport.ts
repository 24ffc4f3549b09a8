/** A transport that tells what its pairs are asked to do, and holds back data until told. */
import { deferred } from '../../src/deferred.ts';
import type { MemoryRef } from '../../src/device/device.ts';
import { PdError } from '../../src/errors.ts';
import type { Pair, Transport } from '../../src/transport/transport.ts';

export class WatchedTransport {
  /** Bytes of each region of each send, in order. */
  readonly sends: number[][] = [];
  readonly #pairs: Pair[] = [];
  #gate: ReturnType<typeof deferred<void>> | undefined;

  readonly wrap = (transport: Transport): Transport => ({
    kind: transport.kind,
    createUniqueId: () => transport.createUniqueId(),
    dispose: () => transport.dispose(),
    open: async (options) => {
      const pair = await transport.open(options);
      this.#pairs.push(pair);
      return new Proxy(pair, {
        get: (target, key) => {
          if (key === 'send') {
            return async (regions: readonly MemoryRef[], sendOptions: Parameters<Pair['send']>[1]) => {
              this.sends.push(regions.map(({ bytes }) => bytes));
              if (this.#gate) await Promise.race([this.#gate.promise, target.over]);
              return target.send(regions, sendOptions);
            };
          }
          const value: unknown = Reflect.get(target, key, target);
          return typeof value === 'function' ? value.bind(target) : value;
        },
      });
    },
  });

  hold(): void {
    this.#gate = deferred<void>();
  }

  release(): void {
    this.#gate?.resolve();
    this.#gate = undefined;
  }

  kill(): void {
    for (const pair of this.#pairs) pair.abort(new PdError('PEER_LOST', 'killed by the test'));
  }
}
