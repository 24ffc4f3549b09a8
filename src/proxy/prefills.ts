/** How many requests of this proxy each producer has in prefill. Pure. */
import type { Instance } from './registry.ts';

export class Prefills {
  readonly #counts = new Map<string, number>();

  at({ httpAddress }: Instance): number {
    return this.#counts.get(httpAddress) ?? 0;
  }

  /** Counts one more; returns the function that takes it out again, to be called once. */
  enter(producer: Instance): () => void {
    const { httpAddress } = producer;
    this.#counts.set(httpAddress, this.at(producer) + 1);
    return () => {
      const left = this.at(producer) - 1;
      if (left > 0) this.#counts.set(httpAddress, left);
      else this.#counts.delete(httpAddress);
    };
  }
}
