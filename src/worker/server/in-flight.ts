/** Requests under way: their ids are unique, and draining waits for them. */
import { PdError } from '../../errors.ts';
import { type TransferId, transferIdOf } from '../../wire/ids.ts';

export class InFlight {
  readonly #ids = new Set<string>();
  /** What the KV of a prompt is known by, where that is not the server's own id for it (`--kv-key engine`). */
  readonly #keys = new Map<string, TransferId>();
  readonly #idle = new Set<() => void>();
  #draining = false;

  get size(): number {
    return this.#ids.size;
  }

  get draining(): boolean {
    return this.#draining;
  }

  /** Returns the function that ends the request. Throws SERVER_DRAINING, or REQUEST_INVALID where the id is under way. */
  enter(id: string): () => void {
    if (this.#draining) throw new PdError('SERVER_DRAINING', 'this worker is stopping');
    if (this.#ids.has(id)) {
      // Both would have one transfer id: KV of the one would reach the other.
      throw new PdError('REQUEST_INVALID', `a request with id ${id} is under way`, { param: 'X-Request-Id' });
    }
    this.#ids.add(id);
    return () => {
      this.#ids.delete(id);
      if (this.#ids.size === 0) for (const resolve of this.#idle) resolve();
    };
  }

  /** Returns the function that ends it. */
  know(serverId: string, transferId: TransferId): () => void {
    this.#keys.set(serverId, transferId);
    return () => void this.#keys.delete(serverId);
  }

  /** What the KV of a prompt is known by, under way or not. */
  transferIdOf(serverId: string): TransferId {
    return this.#keys.get(serverId) ?? transferIdOf(serverId);
  }

  /** From now on nothing new. Resolves with whether all was done within `timeoutMs`. */
  async drain(timeoutMs: number): Promise<boolean> {
    this.#draining = true;
    if (this.#ids.size === 0) return true;
    return await new Promise<boolean>((resolve) => {
      const done = () => finish(true);
      const timer = setTimeout(() => finish(false), timeoutMs);
      const finish = (all: boolean) => {
        clearTimeout(timer);
        this.#idle.delete(done);
        resolve(all);
      };
      this.#idle.add(done);
    });
  }
}
