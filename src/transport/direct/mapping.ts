/** A peer's cache in this process: mapped when its offer comes, unmapped when it is dead and our own writes have ended. */
import { closeSync } from 'node:fs';
import type { CudaDevice } from '../../device/cuda/device.ts';
import { SharedMemory } from '../../device/cuda/shared-memory.ts';
import { PdError } from '../../errors.ts';
import { type CacheClaims, checkSameGeometry } from './claims.ts';
import type { Offer } from './endpoint.ts';
import { PAGE_BYTES, WriterPage } from './page.ts';
import type { MappedCache } from './writer.ts';

/** What writes into a mapping, in whichever thread: its `close` resolves when no launch of it can run any more. */
export interface MappingUser {
  close(): Promise<void>;
}

export class CacheMapping {
  /** For writers of any thread of this process. */
  readonly cache: MappedCache;
  readonly #memory: SharedMemory;
  #closing: Promise<void> | undefined;

  private constructor(memory: SharedMemory, cache: MappedCache) {
    this.#memory = memory;
    this.cache = cache;
  }

  /**
   * Maps what a peer offers, and closes its descriptors in any case. Throws DIRECT_REFUSED where it is of another geometry than `ours`, its
   * memory does not hold what it claims, or this GPU does not reach it.
   */
  static open(device: CudaDevice, offer: Offer, ours: CacheClaims, peer: string): CacheMapping {
    let memory: SharedMemory | undefined;
    try {
      checkSameGeometry(ours, offer.claims);
      memory = SharedMemory.map(device, offer.cache, offer.claims.bytes, `the KV cache of ${peer}`);
      const page = WriterPage.map(offer.page);
      const pageOnDevice = device.runtime.hostRegister(page.address, PAGE_BYTES, `the page of ${peer}`);
      const { pointer } = memory.memory;
      return new CacheMapping(memory, { pointer, claims: offer.claims, page, pageOnDevice });
    } catch (error) {
      memory?.dispose();
      const failed = PdError.from(error, 'CUDA_ERROR');
      throw failed.code === 'DIRECT_REFUSED'
        ? failed
        : new PdError(
            'DIRECT_REFUSED',
            `the KV cache of ${peer} cannot be mapped as ${offer.claims.bytes} bytes: ${failed.message}`,
            { peer },
            { cause: failed },
          );
    } finally {
      closeSync(offer.cache);
      closeSync(offer.page);
    }
  }

  /**
   * Unmaps once every user has ended its writes; the page stays. Rejects, with the mapping in place, where one has not ended within its
   * deadline: its launches may still run, and unmapping under them would end this process's context. Then ask again later.
   */
  close(users: readonly MappingUser[]): Promise<void> {
    this.#closing ??= Promise.all(users.map((user) => user.close())).then(
      () => this.#memory.dispose(),
      (error) => {
        this.#closing = undefined;
        throw error;
      },
    );
    return this.#closing;
  }
}
