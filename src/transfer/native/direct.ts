/**
 * The hand-over's way between GPUs of one host, on the core thread: who has our cache mapped, and whose cache we have. Sockets, mappings and
 * launches are transport/direct's; what may be written when is the ledgers'.
 *
 *   owner    hello of a producer: expect(nonce) --> it connects, maps our cache and says so --> open(nonce)   page: grants and flags
 *   writer   hello of a consumer: connect(...)  --> maps its cache, opens a writer          --> open(nonce)   write
 *   both     the other process ends --> died(nonce), at the owner once what it had queued has landed
 */
import { closeSync } from 'node:fs';
import { CudaDevice } from '../../device/cuda/device.ts';
import type { Device, EventRef } from '../../device/device.ts';
import type { NamedLayer } from '../../device/paged-cache.ts';
import { EventPoller } from '../../device/poller.ts';
import { PdError } from '../../errors.ts';
import type { PagedLayout } from '../../kv/layout.ts';
import type { Logger } from '../../observability/log.ts';
import type { MetricsPage } from '../../observability/metrics.ts';
import type { CacheClaims } from '../../transport/direct/claims.ts';
import { bootId, DirectEndpoint, type DirectLink, type Offer } from '../../transport/direct/endpoint.ts';
import { createWhenFree, ExportedCache } from '../../transport/direct/exported-cache.ts';
import { CacheMapping } from '../../transport/direct/mapping.ts';
import { OwnerPage, WriterPage } from '../../transport/direct/page.ts';
import {
  type BlockTables,
  CTAS_ALONE,
  CTAS_BESIDE_COMPUTE,
  type DirectWriter,
  DirectWriters,
} from '../../transport/direct/writer.ts';
import type { MappingState } from './hand-over-api.ts';
import type { HelloMessage, Nonce } from './messages.ts';
import { SelfTests } from './self-test.ts';

/** Waits for a minute where the GPU's memory is held by others. */
export function exportedCache(
  device: Device,
  layout: PagedLayout,
  names: readonly string[],
  log: Logger,
): Promise<ExportedCache> {
  const cuda = cudaOf(device);
  const onWait = (why: string) => log.warn(`the KV cache waits for memory: ${why}`);
  const create = () => new ExportedCache(cuda, layout, names);
  return createWhenFree(cuda, create, { onWait, own: cuda.allocatedBytes });
}

function cudaOf(device: Device): CudaDevice {
  if (device instanceof CudaDevice) return device;
  throw new PdError('CONFIG_INVALID', `direct writes need --device cuda:N, not ${device.name}`);
}

interface DirectOptions {
  readonly device: Device;
  readonly layers: readonly NamedLayer[];
  /** Absent where nobody writes into our cache. */
  readonly exported: ExportedCache | undefined;
  readonly nonce: Nonce;
  /** Folder of sockets; the user's own where nothing is said. */
  readonly folder?: string;
  readonly log: Logger;
  readonly metrics: MetricsPage;
}

interface DirectEvents {
  /** Whether nothing is computed or written here: what measures itself waits for that. */
  idle(): boolean;
  /** Writes between that process and this one can begin. */
  open(nonce: Nonce): void;
  /** They cannot, and why. */
  refused(nonce: Nonce, why: string): void;
  /** That process is dead: nothing of it is under way. */
  died(nonce: Nonce): void;
}

/** A process that may write into our cache. */
interface Writing {
  readonly link: DirectLink;
  readonly page: OwnerPage;
}

/** A process whose cache we write into. */
interface Target {
  readonly peer: string;
  readonly claims: CacheClaims;
  readonly link: DirectLink;
  readonly mapping: CacheMapping;
  readonly writer: DirectWriter;
  readonly page: WriterPage;
}

/** A peer may not have heard our answer to its hello yet when we connect: tried again, so often and so many ms apart. */
const TRIES = 50;
const AGAIN_MS = 20;
/** What a killed process had queued on its GPU lands within this. */
const MARGIN_MS = 100;

export class DirectWays {
  readonly #options: DirectOptions;
  readonly #device: CudaDevice;
  readonly #writers: DirectWriters;
  readonly #endpoint: DirectEndpoint;
  /** Pages of processes that have connected and whose link is still to come. */
  readonly #offered = new Map<Nonce, { readonly page: OwnerPage; readonly offer: Offer }>();
  readonly #expected = new Set<Nonce>();
  readonly #writing = new Map<Nonce, Writing>();
  readonly #targets = new Map<Nonce, Target>();
  readonly #connecting = new Set<Nonce>();
  readonly #poller = new EventPoller();
  readonly #tests: SelfTests;
  #events: DirectEvents | undefined;
  #closed = false;

  private constructor(options: DirectOptions, writers: DirectWriters, endpoint: DirectEndpoint) {
    this.#options = options;
    this.#device = cudaOf(options.device);
    this.#writers = writers;
    this.#endpoint = endpoint;
    this.#tests = new SelfTests({
      device: this.#device,
      poller: this.#poller,
      log: options.log,
      idle: () => this.#events?.idle() ?? false,
      onChange: () => this.#measure(),
    });
  }

  /** Before the first NCCL pair opens, as it loads a kernel. Throws DIRECT_REFUSED, SYSTEM_CALL_FAILED or CUDA_ERROR. */
  static async open(options: DirectOptions): Promise<DirectWays> {
    const { device, layers, nonce, folder, log } = options;
    const writers = new DirectWriters(cudaOf(device), layers);
    let ways: DirectWays | undefined;
    const endpoint = await DirectEndpoint.listen({
      ...(folder !== undefined && { folder }),
      nonce,
      admit: (peer) => (ways ? ways.#admit(peer as Nonce) : undefined),
      onLink: (link) => (ways ? ways.#linked(link) : link.close()),
      onRefused: (error) => log.debug({ code: error.code }, `direct: ${error.message}`),
    });
    ways = new DirectWays(options, writers, endpoint);
    return ways;
  }

  /** For the hello. */
  get place(): NonNullable<HelloMessage['direct']> {
    return { bootId: bootId(), path: this.#endpoint.path };
  }

  serve(events: DirectEvents): void {
    this.#events = events;
  }

  /** Caches that are written into now: ours, by other processes, and theirs. `peerOf`: where a process was heard of last. */
  mappings(peerOf: (nonce: Nonce) => string | undefined): MappingState[] {
    const bytes = this.#options.exported?.claims.bytes ?? 0;
    const ours = [...this.#writing.keys()].map(
      (nonce): MappingState => ({ peer: peerOf(nonce) ?? nonce, cache: 'ours', bytes }),
    );
    const theirs = [...this.#targets.values()].map((target): MappingState => {
      const path = this.#tests.stateOf(target);
      return { peer: target.peer, cache: 'theirs', bytes: target.claims.bytes, ...(path && { path }) };
    });
    return [...ours, ...theirs];
  }

  /** That producer has said hello: it may connect. */
  expect(nonce: Nonce): void {
    this.#expected.add(nonce);
  }

  /** In which that process is granted slots, and says how far it is; undefined where it does not write here. */
  pageOf(nonce: Nonce): OwnerPage | undefined {
    return this.#writing.get(nonce)?.page;
  }

  /** Maps the cache of a consumer that has said hello; `open` or `refused` follows. Once for each process. */
  connect(peer: string, nonce: Nonce, path: string): void {
    if (this.#closed || this.#targets.has(nonce) || this.#connecting.has(nonce)) return;
    this.#connecting.add(nonce);
    this.#connect(peer, nonce, path)
      .catch((error: unknown) => {
        if (!this.#closed) this.#events?.refused(nonce, PdError.from(error).message);
      })
      .finally(() => this.#connecting.delete(nonce));
  }

  /**
   * A write of these blocks, all layers, into the cache of that process: its launches follow by `layers`. Undefined where too much is under
   * way to take the lists: again once something has landed. Throws DIRECT_REFUSED where that process's cache is not mapped.
   */
  begin(
    nonce: Nonce,
    write: { readonly sources: readonly number[]; readonly targets: readonly number[] } & Pick<
      DirectWriteOptions,
      'seq' | 'slot' | 'last'
    >,
  ): LayerWrites | undefined {
    const target = this.#targets.get(nonce);
    if (!target) throw new PdError('DIRECT_REFUSED', "the consumer's cache is not mapped here");
    const { sources, targets, ...options } = write;
    const tables = target.writer.tables(Int32Array.from(sources), Int32Array.from(targets));
    return (
      tables &&
      new DirectWrite(target, tables, this.#poller, { ...options, numLayers: this.#options.layers.length })
    );
  }

  /** The page of a consumer, for what its writer says of a slot; undefined where its cache is not mapped. */
  targetPage(nonce: Nonce): WriterPage | undefined {
    return this.#targets.get(nonce)?.page;
  }

  /** Every write into that process's cache has landed, and none will follow: unmaps it. */
  release(nonce: Nonce): void {
    const target = this.#targets.get(nonce);
    this.#expected.delete(nonce);
    if (!target) return;
    this.#targets.delete(nonce);
    this.#tests.remove(target);
    this.#measure();
    void this.#unmap(target);
  }

  /** Every WANT is answered and nothing is launched any more: unmaps, and says so by ending the links. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#tests.close();
    const targets = [...this.#targets.values()];
    this.#targets.clear();
    await Promise.all(targets.map(({ mapping, writer }) => mapping.close([writer]).catch(() => undefined)));
    await this.#endpoint.dispose();
    for (const { offer } of this.#offered.values()) closeSync(offer.page);
    this.#poller.dispose();
  }

  #admit(nonce: Nonce): { readonly offer: Offer } | undefined {
    const { exported } = this.#options;
    if (!exported || !this.#expected.has(nonce) || this.#writing.has(nonce)) return undefined;
    const before = this.#offered.get(nonce);
    if (before) closeSync(before.offer.page);
    const made = OwnerPage.create();
    const offer = { claims: exported.claims, cache: exported.descriptor, page: made.descriptor };
    this.#offered.set(nonce, { page: new OwnerPage(made.ref), offer });
    return { offer };
  }

  #linked(link: DirectLink): void {
    const nonce = link.peer as Nonce;
    const offered = this.#offered.get(nonce);
    this.#offered.delete(nonce);
    if (!offered) {
      link.close();
      return;
    }
    closeSync(offered.offer.page);
    void link.verdict.then((verdict) => {
      if (!verdict.mapped) {
        link.close();
        this.#events?.refused(nonce, verdict.why);
        return;
      }
      this.#writing.set(nonce, { link, page: offered.page });
      this.#measure();
      void link.ended.then(() => setTimeout(() => this.#died(nonce), MARGIN_MS));
      this.#events?.open(nonce);
    });
  }

  #died(nonce: Nonce): void {
    this.#writing.delete(nonce);
    this.#expected.delete(nonce);
    this.#measure();
    this.#events?.died(nonce);
  }

  #measure(): void {
    const { metrics } = this.#options;
    metrics.set('pd_native_mappings', this.#writing.size, 'ours');
    metrics.set('pd_native_mappings', this.#targets.size, 'theirs');
    const paths = [...this.#targets.values()].flatMap((target) => {
      const path = this.#tests.stateOf(target);
      return path?.state === 'measured' ? [path] : [];
    });
    paths.sort((a, b) => a.bytesPerSecond - b.bytesPerSecond);
    const [slowest] = paths;
    metrics.set('pd_native_path_bytes_per_second', slowest?.bytesPerSecond ?? 0);
    metrics.set('pd_native_path_expected_bytes_per_second', slowest?.expectedBytesPerSecond ?? 0);
    metrics.set('pd_native_path_latency_seconds', slowest?.latencySeconds ?? 0);
  }

  async #connect(peer: string, nonce: Nonce, path: string): Promise<void> {
    const link = await this.#reach(nonce, path);
    const { log } = this.#options;
    const { offer } = link;
    let mapping: CacheMapping | undefined;
    let writer: DirectWriter | undefined;
    try {
      if (!offer) throw new PdError('DIRECT_REFUSED', `${peer} offers no cache`);
      mapping = CacheMapping.open(this.#device, offer, this.#writers.claims, peer);
      writer = await this.#writers.open(mapping.cache);
      if (this.#closed) throw new PdError('ENGINE_CLOSED', 'this worker has stopped meanwhile');
      const page = new WriterPage(mapping.cache.page);
      const target = { peer, claims: offer.claims, link, mapping, writer, page };
      this.#targets.set(nonce, target);
      this.#measure();
      link.tell({ mapped: true });
      void link.ended.then(() => {
        // its owner is dead, so what still waits in the stream writes nothing, and drains at once
        page.revokeAll();
        this.#events?.died(nonce);
      });
    } catch (error) {
      const failed = PdError.from(error);
      await mapping?.close(writer ? [writer] : []);
      link.tell({ mapped: false, why: failed.message });
      throw failed;
    }
    log.debug({ peer, nonce, kernel: this.#writers.kernelImage }, `the KV cache of ${peer} is mapped`);
    this.#events?.open(nonce);
    const target = this.#targets.get(nonce);
    if (target) this.#tests.add(target);
  }

  async #reach(nonce: Nonce, path: string): Promise<DirectLink> {
    for (let tries = 1; ; tries++) {
      try {
        return await this.#endpoint.connect({ path, nonce });
      } catch (error) {
        if (tries === TRIES || this.#closed) throw error;
        await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      }
    }
  }

  /** As soon as launches under way have ended, however long that takes: an unmapping under them would end our context. */
  async #unmap({ peer, link, mapping, writer }: Target): Promise<void> {
    const since = performance.now();
    for (;;) {
      try {
        await mapping.close([writer]);
        link.close();
        const milliseconds = Math.round(performance.now() - since);
        this.#options.log.info(
          { peer, milliseconds },
          `the KV cache of ${peer} is unmapped, its memory free`,
        );
        return;
      } catch (error) {
        this.#options.log.warn(
          { err: PdError.from(error) },
          'the cache of a peer that is gone stays mapped for now',
        );
        if (this.#closed) return;
      }
    }
  }
}

interface DirectWriteOptions {
  readonly seq: number;
  readonly slot: number;
  /** The last write of this WANT: behind its last layer the slot's flag is set. */
  readonly last: boolean;
  readonly numLayers: number;
}

/** Launches of one write, layer by layer. */
export interface LayerWrites {
  /** Behind `ready`; without one all of it is there, and nothing is computed beside. */
  layers(first: number, count: number, ready: EventRef | undefined): void;
  /** No launch follows. Resolves once those made have ended; rejects where they failed, and with the GPU all else. */
  landed(): Promise<void>;
}

class DirectWrite implements LayerWrites {
  readonly #target: Target;
  readonly #tables: BlockTables;
  readonly #poller: EventPoller;
  readonly #options: DirectWriteOptions;
  #launched = false;

  constructor(target: Target, tables: BlockTables, poller: EventPoller, options: DirectWriteOptions) {
    this.#target = target;
    this.#tables = tables;
    this.#poller = poller;
    this.#options = options;
    if (options.last) target.page.progress(options.slot, options.seq, 'last');
  }

  layers(first: number, count: number, ready: EventRef | undefined): void {
    const { seq, slot, last, numLayers } = this.#options;
    const { writer } = this.#target;
    if (ready) writer.wait(ready);
    const flagged = last && first + count === numLayers;
    this.#launched = true;
    writer.write(
      this.#tables,
      { first, count },
      {
        seq,
        slot,
        ctas: ready ? CTAS_BESIDE_COMPUTE : CTAS_ALONE,
        ...(flagged && { mark: 1 }),
      },
    );
  }

  async landed(): Promise<void> {
    this.#tables.release();
    if (!this.#launched) return;
    const { writer, page } = this.#target;
    await this.#poller.drained(writer, Number.POSITIVE_INFINITY, "a write into a consumer's cache");
    const { slot, seq } = this.#options;
    const faults = page.faults(slot);
    if (faults > 0)
      throw new PdError('INTERNAL', `write of WANT ${seq} met ${faults} blocks outside of a cache`);
  }
}
