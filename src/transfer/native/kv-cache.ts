/** A paged KV cache whose memory is taken here: on a GPU such that workers of the same host may write into it. */
import type { Device } from '../../device/device.ts';
import { allocatePagedCache, type NamedLayer } from '../../device/paged-cache.ts';
import type { PagedLayout } from '../../kv/layout.ts';
import { createLogger, type Logger } from '../../observability/log.ts';
import type { ExportedCache } from '../../transport/direct/exported-cache.ts';

export class KvCache {
  /** One for each name, all of one layout. */
  readonly layers: readonly NamedLayer[];
  /**
   * What peers may map; undefined on the host.
   * @internal
   */
  readonly exported: ExportedCache | undefined;

  private constructor(layers: readonly NamedLayer[], exported: ExportedCache | undefined) {
    this.layers = layers;
    this.exported = exported;
  }

  /**
   * Takes memory of `device` for one layer of `layout` per name (`attentionLayerName`). On a GPU it waits for up to a minute where others hold
   * the memory, such as peers that still have the cache of a dead predecessor mapped. Throws OUT_OF_DEVICE_MEMORY, which names them.
   */
  static async allocate(
    device: Device,
    layout: PagedLayout,
    names: readonly string[],
    log: Logger = createLogger({ level: 'warn', format: 'auto' }, 'cache'),
  ): Promise<KvCache> {
    if (device.kind !== 'cuda') return new KvCache(allocatePagedCache(device, layout, names), undefined);
    // a machine without a GPU needs none of its libraries
    const { exportedCache } = await import('./direct.ts');
    const exported = await exportedCache(device, layout, names, log);
    return new KvCache(exported.layers, exported);
  }

  /** After the last use of its layers, and after whatever writes into it has been closed. Host memory is the garbage collector's. Idempotent. */
  dispose(): void {
    this.exported?.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
