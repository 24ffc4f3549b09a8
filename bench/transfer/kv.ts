/** The KV of one peer: an area of device memory, filled with the pattern and compared with it byte by byte, never while timing. */
import type { Device, MemoryRef, PagedLayer, Stream } from '../../src/device/device.ts';
import { sliceMemory } from '../../src/device/memory.ts';
import type { EventPoller } from '../../src/device/poller.ts';
import { PdError } from '../../src/errors.ts';
import { layerBytes, type PagedLayout, runBytes, runOffset, runsPerBlock } from '../../src/kv/layout.ts';
import type { FlatJob, Job, PagedJob } from './messages.ts';
import { Pattern } from './pattern.ts';
import { blocksOf, blockTable, cacheBlocks, type KvShape, layerName, layoutOf } from './shape.ts';

/** Tensors begin at multiples of this, as a model's allocations would. */
const ALIGN = 256;
/** For filling and reading back one round. */
const COPY_TIMEOUT_MS = 60_000;

export interface CheckResult {
  /** How many were compared. */
  readonly bytes: number;
  /** The first difference, if any. */
  readonly wrong?: string;
}

/** Where the blocks of a job are on either side; both ends compute the same. */
interface Plan {
  readonly layout: PagedLayout;
  readonly source: Int32Array;
  readonly target: Int32Array;
}

export class BenchKv {
  readonly #device: Device;
  readonly #shape: KvShape;
  readonly #poller: EventPoller;
  readonly #stream: Stream;
  /** All of it, for ceilings, which move bytes without checking them. */
  readonly area: MemoryRef;
  readonly #pattern: Pattern;
  readonly #scratch: MemoryRef;
  readonly #view: Buffer;
  #checking: Promise<unknown> = Promise.resolve();

  private constructor(
    device: Device,
    shape: KvShape,
    poller: EventPoller,
    area: MemoryRef,
    pattern: Pattern,
    scratch: MemoryRef,
  ) {
    this.#device = device;
    this.#shape = shape;
    this.#poller = poller;
    this.#stream = device.createStream();
    this.area = area;
    this.#pattern = pattern;
    this.#scratch = scratch;
    const view = device.view(scratch);
    this.#view = Buffer.from(view.buffer, view.byteOffset, view.byteLength);
  }

  /** Throws OUT_OF_DEVICE_MEMORY. All memory is allocated here, and none is freed while the engine serves. */
  static async create(
    device: Device,
    shape: KvShape,
    poller: EventPoller,
    sizes: { readonly areaBytes: number; readonly largestBytes: number },
  ): Promise<BenchKv> {
    const area = device.allocate(sizes.areaBytes, 'KV of the benchmark');
    const run = await device.allocatePinned(
      Pattern.bytes(sizes.largestBytes),
      'the pattern of the benchmark',
    );
    const scratch = await device.allocatePinned(sizes.largestBytes, 'reading back in the benchmark');
    return new BenchKv(device, shape, poller, area, new Pattern(run, device.view(run)), scratch);
  }

  /** Bytes of area that a job needs on its larger end. */
  static areaBytes(shape: KvShape, job: Job): number {
    switch (job.kind) {
      case 'paged':
        return (job.slot + 1) * shape.layers * aligned(layerBytes(planOf(shape, job).layout));
      case 'flat':
        return job.count * aligned(job.bytes);
    }
  }

  /** The longest run of bytes of a job that is filled or checked at once. */
  static largestBytes(shape: KvShape, job: Job): number {
    return job.kind === 'flat' ? job.bytes : layerBytes(planOf(shape, job).layout);
  }

  /** All slots have the same source. */
  layers(job: PagedJob, side: 'source' | 'target'): { readonly name: string; readonly target: PagedLayer }[] {
    const { layout } = planOf(this.#shape, job);
    const first = this.#firstPart(job, side);
    return Array.from({ length: this.#shape.layers }, (_, layer) => ({
      name: layerName(layer),
      target: { memory: this.#part(first + layer, layerBytes(layout)), layout },
    }));
  }

  blockIds(job: PagedJob, side: 'source' | 'target'): Int32Array {
    return planOf(this.#shape, job)[side];
  }

  /** Tensor `index` of a flat job, at the source. */
  flat(job: FlatJob, index: number): MemoryRef {
    return this.#part(index, job.bytes);
  }

  async fill(job: Job, side: 'source' | 'target'): Promise<void> {
    if (job.kind === 'flat') {
      // at the target the engine owns the memory, and allocates it only when the tensor is announced
      if (side === 'target') return;
      for (let i = 0; i < job.count; i++) this.#write(this.#part(i, job.bytes), job.stream + i);
    } else {
      const bytes = layerBytes(planOf(this.#shape, job).layout);
      const stream = side === 'source' ? job.stream : behind(job, this.#shape);
      const first = this.#firstPart(job, side);
      for (let i = 0; i < this.#shape.layers; i++) this.#write(this.#part(first + i, bytes), stream + i);
    }
    await this.#settled('filling');
  }

  /** The caches of the target: the request's blocks must hold the source's, all others what they held before. */
  checkPaged(job: PagedJob): Promise<CheckResult> {
    return this.#alone(() => this.#checkPaged(job));
  }

  /** A cache that is not in the area: layer `i` holds stream `stream + i` then. */
  async fillCache(layers: readonly PagedLayer[], stream: number): Promise<void> {
    for (const [i, { memory }] of layers.entries()) this.#write(memory, stream + i);
    await this.#settled('filling');
  }

  /** Blocks `target` of such a cache must hold what blocks `source` of one filled with `stream` hold. */
  checkCache(
    layers: readonly PagedLayer[],
    stream: number,
    source: readonly number[],
    target: readonly number[],
  ): Promise<CheckResult> {
    return this.#alone(() => this.#checkCache(layers, stream, source, target));
  }

  /** Tensors of a flat job, in order, wherever the engine put them. */
  checkFlat(job: FlatJob, tensors: readonly MemoryRef[]): Promise<CheckResult> {
    return this.#alone(() => this.#checkFlat(job, tensors));
  }

  /** One check at a time: they read back into the same memory. */
  #alone(check: () => Promise<CheckResult>): Promise<CheckResult> {
    const result = this.#checking.then(check);
    this.#checking = result.catch(() => undefined);
    return result;
  }

  async #checkPaged(job: PagedJob): Promise<CheckResult> {
    const { layout, source, target } = planOf(this.#shape, job);
    const bytes = layerBytes(layout);
    const length = runBytes(layout);
    const cameFrom = new Map([...target].map((block, at) => [block, source[at]!]));
    const first = this.#firstPart(job, 'target');
    for (let layer = 0; layer < this.#shape.layers; layer++) {
      await this.#read(this.#part(first + layer, bytes));
      for (let block = 0; block < layout.numBlocks; block++) {
        const from = cameFrom.get(block);
        const stream = (from === undefined ? behind(job, this.#shape) : job.stream) + layer;
        for (let run = 0; run < runsPerBlock(layout); run++) {
          const at = runOffset(layout, layout.numBlocks, block, run);
          const expected = runOffset(layout, layout.numBlocks, from ?? block, run);
          const differs = this.#pattern.differs(stream, expected, this.#view, at, length);
          if (differs < 0) continue;
          const what = from === undefined ? 'not of the request, but changed' : `came from block ${from}`;
          return {
            bytes: layer * bytes + at,
            wrong: `${job.id}: layer ${layer}, block ${block} (${what}), run ${run}: byte ${differs} of ${length} differs`,
          };
        }
      }
    }
    return { bytes: bytes * this.#shape.layers };
  }

  async #checkCache(
    layers: readonly PagedLayer[],
    stream: number,
    source: readonly number[],
    target: readonly number[],
  ): Promise<CheckResult> {
    let bytes = 0;
    for (const [layer, { memory, layout }] of layers.entries()) {
      await this.#read(memory);
      const length = runBytes(layout);
      for (const [i, block] of target.entries()) {
        for (let run = 0; run < runsPerBlock(layout); run++) {
          const at = runOffset(layout, layout.numBlocks, block, run);
          const expected = runOffset(layout, layout.numBlocks, source[i]!, run);
          const differs = this.#pattern.differs(stream + layer, expected, this.#view, at, length);
          if (differs >= 0)
            return { bytes, wrong: `layer ${layer}, block ${block}, run ${run}: byte ${differs} differs` };
          bytes += length;
        }
      }
    }
    return { bytes };
  }

  async #checkFlat(job: FlatJob, tensors: readonly MemoryRef[]): Promise<CheckResult> {
    if (tensors.length !== job.count) {
      return { bytes: 0, wrong: `${job.id}: ${tensors.length} tensors arrived, not ${job.count}` };
    }
    for (const [i, tensor] of tensors.entries()) {
      if (tensor.bytes !== job.bytes) {
        return {
          bytes: i * job.bytes,
          wrong: `${job.id}: tensor ${i} has ${tensor.bytes} bytes, not ${job.bytes}`,
        };
      }
      await this.#read(tensor);
      const differs = this.#pattern.differs(job.stream + i, 0, this.#view, 0, job.bytes);
      if (differs >= 0)
        return { bytes: i * job.bytes, wrong: `${job.id}: tensor ${i}: byte ${differs} differs` };
    }
    return { bytes: job.count * job.bytes };
  }

  #firstPart(job: PagedJob, side: 'source' | 'target'): number {
    return side === 'source' ? 0 : job.slot * this.#shape.layers;
  }

  #part(index: number, bytes: number): MemoryRef {
    const at = index * aligned(bytes);
    if (at + bytes > this.area.bytes) {
      throw new PdError(
        'INTERNAL',
        `the benchmark's area of ${this.area.bytes} bytes ends before ${at}+${bytes}`,
      );
    }
    return sliceMemory(this.area, at, bytes);
  }

  #write(memory: MemoryRef, stream: number): void {
    this.#device.copy(memory, this.#pattern.window(stream, memory.bytes), this.#stream);
  }

  async #read(memory: MemoryRef): Promise<void> {
    this.#device.copy(sliceMemory(this.#scratch, 0, memory.bytes), memory, this.#stream);
    await this.#settled('reading back');
  }

  async #settled(what: string): Promise<void> {
    const event = this.#stream.record();
    try {
      await this.#poller.wait(event, COPY_TIMEOUT_MS, `${what} the benchmark's KV`);
    } finally {
      event.dispose();
    }
  }
}

function planOf(shape: KvShape, job: PagedJob): Plan {
  const blocks = blocksOf(shape, job.tokens);
  const layout = layoutOf(shape, cacheBlocks(blocks));
  const table = (seed: number) => blockTable(seed, blocks, layout.numBlocks);
  return { layout, source: table(2 * job.seed), target: table(2 * job.seed + 1) };
}

/** The first of the streams that the target holds before the request arrives. */
function behind(job: PagedJob, shape: KvShape): number {
  return job.stream + shape.layers;
}

function aligned(bytes: number): number {
  return Math.ceil(bytes / ALIGN) * ALIGN;
}
