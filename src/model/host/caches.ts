/**
 * The host's view of the paged KV cache: the device's own memory where the CPU can read it. Where it lies in GPU memory (`--executor host`
 * on a cuda device) a copy of it: the host computes here, and transfers move the device's.
 *
 *   computed block   mirror --upload after each layer-->  device --transfer--> peer
 *   loaded block     peer --transfer--> device --download before its sequence first computes--> mirror
 */
import type { Device, MemoryRef, Stream } from '../../device/device.ts';
import { float32View, hostView } from '../../device/memory.ts';
import type { NamedLayer } from '../../device/paged-cache.ts';
import { EventPoller } from '../../device/poller.ts';
import { layerBytes, type PagedLayout } from '../../kv/layout.ts';
import type { ForwardBatch, ScheduledSequence } from '../../scheduler/types.ts';
import { copyBlock } from '../kv-cache.ts';
import { copyBlocks, type HostLayerCache } from './layer-cache.ts';

export interface HostCaches {
  readonly layers: readonly HostLayerCache[];
  /** Makes the step's block copies, and makes readable whatever the step reads. */
  prepare(batch: ForwardBatch): Promise<void> | void;
  /** The step's KV of `layer` has been written here; once this settles it is in the device's cache. */
  written(layer: number, batch: ForwardBatch): Promise<void> | void;
  dispose(): void;
}

export async function openHostCaches(device: Device, layers: readonly NamedLayer[]): Promise<HostCaches> {
  return device.kind === 'host' ? new InPlaceCaches(layers) : MirroredCaches.create(device, layers);
}

/** On the host device: no second copy. */
class InPlaceCaches implements HostCaches {
  readonly layers: readonly HostLayerCache[];

  constructor(layers: readonly NamedLayer[]) {
    this.layers = layers.map(({ cache }) => ({
      values: float32View(hostView(cache.memory)),
      layout: cache.layout,
    }));
  }

  prepare(batch: ForwardBatch): void {
    copyBlocks(this.layers, batch);
  }

  written(): void {}

  dispose(): void {}
}

const COPY_TIMEOUT_MS = 30_000;

interface MirroredLayer {
  readonly device: MemoryRef;
  readonly host: MemoryRef;
  readonly layout: PagedLayout;
}

class MirroredCaches implements HostCaches {
  readonly layers: readonly HostLayerCache[];
  readonly #device: Device;
  readonly #mirrored: readonly MirroredLayer[];
  readonly #stream: Stream;
  readonly #poller = new EventPoller();
  /**
   * By sequence of the last step: the position up to which its KV is here. Any other stands on KV that may have come another way, or on
   * other blocks since it was preempted: it is downloaded.
   */
  #known = new Map<string, number>();

  private constructor(device: Device, mirrored: readonly MirroredLayer[]) {
    this.#device = device;
    this.#mirrored = mirrored;
    this.#stream = device.createStream();
    this.layers = mirrored.map(({ host, layout }) => ({ values: float32View(device.view(host)), layout }));
  }

  static async create(device: Device, layers: readonly NamedLayer[]): Promise<MirroredCaches> {
    const mirrored: MirroredLayer[] = [];
    for (const { name, cache } of layers) {
      const host = await device.allocatePinned(
        layerBytes(cache.layout),
        `host mirror of the KV cache of ${name}`,
      );
      mirrored.push({ device: cache.memory, host, layout: cache.layout });
    }
    return new MirroredCaches(device, mirrored);
  }

  async prepare(batch: ForwardBatch): Promise<void> {
    const needed = new Set(batch.blockCopies.map((copy) => copy.source));
    for (const sequence of batch.sequences) {
      if (sequence.start > 0 && this.#known.get(sequence.sequenceId) !== sequence.start) {
        for (const block of this.#blocks(sequence, 0, sequence.start)) needed.add(block);
      }
    }
    this.#known = new Map(
      batch.sequences.map(({ sequenceId, start, tokens }) => [sequenceId, start + tokens.length]),
    );
    // A block that this step's copies fill is not downloaded: the copy is what counts.
    for (const { target } of batch.blockCopies) needed.delete(target);
    if (needed.size > 0) {
      for (const layer of this.#mirrored) this.#copy(layer, needed, 'download');
      await this.#settled('download of loaded KV');
    }
    if (batch.blockCopies.length === 0) return;
    copyBlocks(this.layers, batch);
    const targets = new Set(batch.blockCopies.map((copy) => copy.target));
    for (const layer of this.#mirrored) this.#copy(layer, targets, 'upload');
    await this.#settled('upload of copied KV blocks');
  }

  async written(layer: number, batch: ForwardBatch): Promise<void> {
    const blocks = new Set<number>();
    for (const sequence of batch.sequences) {
      const end = sequence.start + sequence.tokens.length;
      for (const block of this.#blocks(sequence, sequence.start, end)) blocks.add(block);
    }
    this.#copy(this.#mirrored[layer]!, blocks, 'upload');
    await this.#settled(`upload of the KV of layer ${layer}`);
  }

  /** Idempotent. The memory is the device's. */
  dispose(): void {
    this.#poller.dispose();
    this.#stream.dispose();
  }

  #copy(layer: MirroredLayer, blocks: ReadonlySet<number>, direction: 'upload' | 'download'): void {
    const [target, source] = direction === 'upload' ? [layer.device, layer.host] : [layer.host, layer.device];
    for (const block of blocks) {
      copyBlock(
        this.#device,
        this.#stream,
        layer.layout,
        { memory: target, block },
        { memory: source, block },
      );
    }
  }

  /** Blocks that hold positions `start` to `end`, exclusive. */
  #blocks(sequence: ScheduledSequence, start: number, end: number): Int32Array {
    const { blockSize } = this.#mirrored[0]!.layout;
    return sequence.blockTable.subarray(Math.floor(start / blockSize), Math.ceil(end / blockSize));
  }

  #settled(what: string): Promise<void> {
    return this.#poller.drained(this.#stream, COPY_TIMEOUT_MS, what);
  }
}
