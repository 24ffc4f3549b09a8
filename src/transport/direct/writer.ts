/**
 * Writes blocks of our cache into the cache of a peer on this host: the launches of one thread, on one urgent stream.
 *
 *   tables = writer.tables(sourceBlocks, targetBlocks)       both lists to the GPU, once for all layers of a chunk
 *   writer.wait(event)                                       the layer has been computed
 *   writer.write(tables, { first: layer, count: 1 }, ...)    reads the grant, writes, sets the flag
 *   tables.release()                                         after the last launch that reads them
 *   writer.record()                                          fires when all writes so far have ended: then DONE may leave
 *
 * The mapping is the process's, and plain data (`MappedCache`): one thread maps and unmaps, another one may write. Whoever unmaps first
 * awaits `close()` of every writer: a write into a range that is unmapped faults and ends the context.
 */
import { allocateNative, freeNative, nativeView } from '../../../ffi/native.ts';
import type { CudaStreamHandle, DevicePointer, NativePointer } from '../../../ffi/pointers.ts';
import type { CudaDevice } from '../../device/cuda/device.ts';
import { loadKernels } from '../../device/cuda/kernels.ts';
import {
  layersPerWrite,
  MAX_LAYERS_PER_WRITE,
  type PagedWrite,
  WRITE_KERNELS,
  WRITE_LAYER_BYTES,
  WRITE_PARAMETER_BYTES,
  WRITE_THREADS,
  type WriteLayer,
  writeElement,
  writeParameterBlock,
  writeTable,
} from '../../device/cuda/paged-write.ts';
import { type CudaStream, hasDrained } from '../../device/cuda/stream.ts';
import type { DeviceEvent, EventRef, MemoryRef } from '../../device/device.ts';
import { hostMemory, sliceMemory } from '../../device/memory.ts';
import type { NamedLayer } from '../../device/paged-cache.ts';
import { PdError } from '../../errors.ts';
import { type CacheClaims, checkSameGeometry, claimsOf } from './claims.ts';
import { flagOf, type PageRef, PROBE, slotOffsets } from './page.ts';

/** Thread blocks of a launch beside a computation, which keeps its speed; they reach seven eighths of what NVLink gives. */
export const CTAS_BESIDE_COMPUTE = 16;
/** Thread blocks where nothing else is computed: the link is full. */
export const CTAS_ALONE = 64;

/** A peer's cache, mapped into this process. Plain data, which crosses threads. */
export interface MappedCache {
  readonly pointer: DevicePointer;
  readonly claims: CacheClaims;
  readonly page: PageRef;
  /** Where this process's GPU finds the page. */
  readonly pageOnDevice: DevicePointer;
}

/** Two block lists on the GPU. */
export interface BlockTables {
  readonly blocks: number;
  /** When no later launch will read them. Idempotent. */
  release(): void;
}

export interface WriteOptions {
  readonly seq: number;
  readonly slot: number;
  /** Number of this launch among those of its seq, from 1; the flag shows the last that has ended. Without it no flag is set. */
  readonly mark?: number;
  /** Thread blocks; CTAS_BESIDE_COMPUTE where nothing is said. */
  readonly ctas?: number;
}

/** Space for lists of this many full caches: how far chunks may run ahead of their writes. */
const TABLES_AHEAD = 4;
const ID_BYTES = 4;
const COUNTER_BYTES = 16;

interface Entry extends BlockTables {
  /** In ids, from the beginning of the ring. */
  readonly at: number;
  readonly length: number;
  released: boolean;
  event: DeviceEvent | undefined;
}

/** What launches differ in. */
interface Launch extends Pick<PagedWrite, 'target' | 'targetBlocks' | 'table' | 'seq' | 'flag'> {
  readonly element: 16 | 1;
  /** Where the slot's words lie in the page. */
  readonly words: { readonly grant: number; readonly marks: number };
  readonly ctas: number;
}

/** What a closed writer leaves to the next one: device and pinned memory last as long as the device. */
interface WriterMemory {
  readonly pinned: MemoryRef;
  readonly tables: MemoryRef;
  readonly counter: MemoryRef;
}

/** The writers of one thread, for one cache of its own. */
export class DirectWriters {
  readonly #device: CudaDevice;
  readonly #layers: readonly NamedLayer[];
  readonly #kernels: Kernels;
  /** Of our cache; its offsets say nothing, as our layers may lie anywhere. */
  readonly claims: CacheClaims;
  readonly #free: WriterMemory[] = [];

  /** `layers`: all of one layout. Loads the kernel, so before the first NCCL pair opens. Throws CUDA_ERROR. */
  constructor(device: CudaDevice, layers: readonly NamedLayer[]) {
    const [first] = layers;
    if (!first) throw new PdError('INTERNAL', 'a writer without layers');
    this.#device = device;
    this.#layers = layers;
    this.#kernels = loadWrites(device);
    const named = layers.map(({ name }) => ({ name, offset: 0 }));
    this.claims = claimsOf(first.cache.layout, 0, named);
  }

  /** Which image of the kernel is in use. */
  get kernelImage(): string {
    return this.#kernels.image;
  }

  /** For writes into `target`. Throws DIRECT_REFUSED where the two are of different geometry, OUT_OF_DEVICE_MEMORY. */
  async open(target: MappedCache): Promise<DirectWriter> {
    checkSameGeometry(this.claims, target.claims);
    const memory = this.#free.pop() ?? (await this.#allocate());
    const parts = {
      device: this.#device,
      kernels: this.#kernels,
      source: this.claims,
      layers: this.#layers.map(({ cache }) => addressOf(cache.memory)),
      memory,
      onClose: () => this.#free.push(memory),
    };
    return new DirectWriter(parts, target);
  }

  async #allocate(): Promise<WriterMemory> {
    // both lists, no longer than our cache
    const bytes = Math.ceil((2 * ID_BYTES * this.claims.blocks * TABLES_AHEAD) / 512) * 512;
    const pinned = await this.#device.allocatePinned(bytes, 'block tables of writes');
    const memory = this.#device.allocate(bytes + COUNTER_BYTES, 'block tables of writes');
    return {
      pinned,
      tables: sliceMemory(memory, 0, bytes),
      counter: sliceMemory(memory, bytes, COUNTER_BYTES),
    };
  }
}

interface WriterParts {
  readonly device: CudaDevice;
  readonly kernels: Kernels;
  readonly source: CacheClaims;
  readonly layers: readonly bigint[];
  readonly memory: WriterMemory;
  readonly onClose: () => void;
}

export class DirectWriter {
  readonly #device: CudaDevice;
  readonly #stream: CudaStream;
  readonly #parts: WriterParts;
  readonly #source: CacheClaims;
  readonly #target: MappedCache;
  readonly #layers: readonly WriteLayer[];
  readonly #table: Uint8Array;
  readonly #element: 16 | 1;
  readonly #kernels: Kernels;
  readonly #parameters: NativePointer = allocateNative(WRITE_PARAMETER_BYTES);
  readonly #parameterView: DataView;
  readonly #ring: TableRing;
  #closed = false;
  #disposed = false;

  /** By `DirectWriters.open`. */
  constructor(parts: WriterParts, target: MappedCache) {
    const { device, source, kernels, memory } = parts;
    this.#device = device;
    this.#parts = parts;
    this.#source = source;
    this.#target = target;
    this.#layers = parts.layers.map((layer, i) => ({
      source: layer,
      target: target.pointer + BigInt(target.claims.layers[i]!.offset),
    }));
    this.#table = writeTable(this.#layers);
    this.#element = writeElement(source, target.claims, this.#layers);
    this.#kernels = kernels;
    this.#stream = device.createStream({ urgent: true });
    const view = nativeView(this.#parameters, WRITE_PARAMETER_BYTES);
    this.#parameterView = new DataView(view.buffer, view.byteOffset, view.byteLength);
    device.copy(memory.counter, hostMemory(COUNTER_BYTES), this.#stream);
    this.#ring = new TableRing(device, this.#stream, memory.pinned, memory.tables);
  }

  /**
   * Both lists, which are of one length, on their way to the GPU. Undefined where so many wait that there is no room: `tables` of earlier
   * chunks must be released and their writes end first. Throws INTERNAL for an id outside of its cache.
   */
  tables(source: Int32Array, target: Int32Array): BlockTables | undefined {
    this.#open();
    if (source.length !== target.length || source.length === 0)
      throw new PdError('INTERNAL', `a write from ${source.length} to ${target.length} blocks`);
    checkIds(source, this.#source.blocks, 'our cache');
    checkIds(target, this.#target.claims.blocks, "the peer's cache");
    return this.#ring.take(source, target);
  }

  /** Launches from now on start after `event`: a layer's, of any stream. */
  wait(event: EventRef): void {
    this.#open();
    this.#stream.wait(event);
  }

  /**
   * Writes the blocks of `count` layers from `first`. Where the slot's grant names another seq when it runs it writes nothing, and sets no
   * flag. Nothing is checked here of what WANT promised: that is the ledger's.
   */
  write(
    tables: BlockTables,
    layers: { readonly first: number; readonly count: number },
    options: WriteOptions,
  ): void {
    this.#open();
    const entry = this.#ring.entry(tables);
    const { first, count } = layers;
    if (first < 0 || count < 1 || first + count > this.#layers.length)
      throw new PdError('INTERNAL', `layers ${first} to ${first + count} of ${this.#layers.length}`);
    const { seq, slot, mark, ctas = CTAS_BESIDE_COMPUTE } = options;
    const flag = mark === undefined ? 0n : flagOf(seq, mark);
    const offsets = slotOffsets(slot);
    const { claims } = this.#target;
    const most = layersPerWrite(tables.blocks, this.#source, this.#element);
    for (let at = 0; at < count; at += most) {
      const end = first + Math.min(count, at + most);
      this.#launch(entry, {
        target: claims,
        targetBlocks: claims.blocks,
        table: this.#table.subarray(WRITE_LAYER_BYTES * (first + at), WRITE_LAYER_BYTES * end),
        element: this.#element,
        words: offsets,
        seq: BigInt(seq),
        flag: at + most < count ? 0n : flag,
        ctas,
      });
    }
  }

  /**
   * Writes up to `atMost` bytes of our cache, at least a block, into the scratch memory behind the peer's, as fast as it goes; the page tells
   * how long that took (`WriterPage.probeNanoseconds`). Answers the bytes; undefined where there is no such memory, or no room for the lists now.
   */
  probe(atMost: number): number | undefined {
    this.#open();
    const { runBytes, runs, blocks: ours } = this.#source;
    const { claims, pointer } = this.#target;
    const { scratch } = claims;
    const each = runs * runBytes;
    if (!scratch || scratch.bytes < each) return undefined;
    const bytes = Math.min(atMost, scratch.bytes);
    const blocks = Math.min(Math.max(Math.floor(bytes / each), 1), ours);
    const ids = Int32Array.from({ length: blocks }, (_, i) => i);
    const tables = this.#ring.take(ids, ids);
    if (!tables) return undefined;
    // a small cache's one layer would be over before the launch is
    const count = Math.min(Math.max(Math.floor(bytes / (blocks * each)), 1), MAX_LAYERS_PER_WRITE);
    const layers = this.#layers.slice(0, count).map(({ source }, i) => ({
      source,
      target: pointer + BigInt(scratch.offset + i * blocks * each),
    }));
    const target = { runBytes, runs, blockStride: each, runStride: runs === 2 ? runBytes : 0 };
    this.#launch(this.#ring.entry(tables), {
      target,
      targetBlocks: blocks,
      table: writeTable(layers),
      element: writeElement(this.#source, target, layers),
      words: PROBE,
      seq: PROBE.seq,
      flag: PROBE.flag,
      ctas: CTAS_ALONE,
    });
    tables.release();
    return layers.length * blocks * each;
  }

  /** Fires when all that has been enqueued so far has ended. The caller disposes it. */
  record(): DeviceEvent {
    return this.#stream.record();
  }

  /**
   * No more launches. Resolves once those under way have ended, failed or not: then the cache may be unmapped. Rejects with TRANSFER_TIMEOUT after
   * `timeoutMs`, and then the mapping must stay. Idempotent.
   */
  async close(timeoutMs = 10_000): Promise<void> {
    this.#closed = true;
    const deadline = performance.now() + timeoutMs;
    while (!hasDrained(this.#stream)) {
      if (performance.now() > deadline)
        throw new PdError(
          'TRANSFER_TIMEOUT',
          `writes into a peer's cache have not ended within ${timeoutMs} ms`,
        );
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    if (this.#disposed) return;
    this.#disposed = true;
    this.#ring.dispose();
    this.#stream.dispose();
    freeNative(this.#parameters);
    this.#parts.onClose();
  }

  /** The one way to the GPU: what the self-test launches so often that it is compiled is what a request launches. */
  #launch(entry: Entry, launch: Launch): void {
    const { element, words, ctas, ...what } = launch;
    const { pageOnDevice } = this.#target;
    const write = {
      ...what,
      source: this.#source,
      sourceBlocks: this.#source.blocks,
      sourceIds: this.#ring.address + BigInt(ID_BYTES * entry.at),
      targetIds: this.#ring.address + BigInt(ID_BYTES * (entry.at + entry.blocks)),
      blocks: entry.blocks,
      grant: pageOnDevice + BigInt(words.grant),
      marks: pageOnDevice + BigInt(words.marks),
      counter: addressOf(this.#parts.memory.counter),
    };
    this.#device.enter();
    writeParameterBlock(this.#parameterView, write, element);
    this.#kernels[`write_${element}`].launch(this.#stream.handle, ctas, { p: this.#parameters });
  }

  #open(): void {
    if (this.#closed) throw new PdError('PAIR_CLOSED', "the writer of a peer's cache has been closed");
  }
}

/**
 * Block lists in pinned and in device memory, at the same places in both, in the order of the stream. A place is used again when the event
 * behind its last reader has fired.
 */
class TableRing {
  readonly #device: CudaDevice;
  readonly #stream: CudaStream;
  readonly #pinned: MemoryRef;
  readonly #memory: MemoryRef;
  readonly #ids: Int32Array;
  /** In the order in which they were taken. */
  readonly #entries: Entry[] = [];
  #next = 0;
  disposed = false;

  constructor(device: CudaDevice, stream: CudaStream, pinned: MemoryRef, memory: MemoryRef) {
    this.#device = device;
    this.#stream = stream;
    this.#pinned = pinned;
    this.#memory = memory;
    const { buffer, byteOffset, byteLength } = device.view(pinned);
    this.#ids = new Int32Array(buffer, byteOffset, byteLength / ID_BYTES);
  }

  get address(): bigint {
    return addressOf(this.#memory);
  }

  take(source: Int32Array, target: Int32Array): BlockTables | undefined {
    const length = 2 * source.length;
    const at = this.#place(length);
    if (at === undefined) return undefined;
    this.#ids.set(source, at);
    this.#ids.set(target, at + source.length);
    const bytes = ID_BYTES * length;
    const offset = ID_BYTES * at;
    this.#device.copy(
      sliceMemory(this.#memory, offset, bytes),
      sliceMemory(this.#pinned, offset, bytes),
      this.#stream,
    );
    const entry: Entry = {
      at,
      length,
      blocks: source.length,
      released: false,
      event: undefined,
      release: () => {
        if (entry.released || this.disposed) return;
        entry.released = true;
        entry.event = this.#stream.record();
      },
    };
    this.#entries.push(entry);
    this.#next = at + length;
    return entry;
  }

  entry(tables: BlockTables): Entry {
    const entry = this.#entries.find((each) => each === tables);
    if (!entry || entry.released) throw new PdError('INTERNAL', 'block tables were used after their release');
    return entry;
  }

  /** Where `length` ids lie that no reader of earlier lists sees; undefined where there is no such place now. */
  #place(length: number): number | undefined {
    while (this.#entries[0]?.event?.done()) this.#entries.shift()!.event!.dispose();
    const [oldest] = this.#entries;
    if (!oldest) return length <= this.#ids.length ? 0 : undefined;
    // free: from #next to the oldest, round the end
    if (this.#next > oldest.at) {
      if (this.#next + length <= this.#ids.length) return this.#next;
      return length < oldest.at ? 0 : undefined;
    }
    return this.#next + length < oldest.at ? this.#next : undefined;
  }

  dispose(): void {
    this.disposed = true;
    for (const { event } of this.#entries.splice(0)) event?.dispose();
  }
}

interface WriteKernel {
  launch(stream: CudaStreamHandle, blocks: number, args: { readonly p: NativePointer }): void;
}

interface Kernels {
  readonly image: string;
  readonly write_16: WriteKernel;
  readonly write_1: WriteKernel;
}

function loadWrites(device: CudaDevice): Kernels {
  device.enter();
  const { image, kernel } = loadKernels(WRITE_KERNELS, device.target);
  const block = { threads: WRITE_THREADS };
  return { image, write_16: kernel('write_16', {}, block), write_1: kernel('write_1', {}, block) };
}

function addressOf(memory: MemoryRef): bigint {
  if (memory.kind === 'cuda') return memory.pointer;
  throw new PdError('INTERNAL', 'a write kernel reaches memory of a GPU only');
}

/** A wrong id would let the launch write anywhere in the other cache; the kernel looks again. */
function checkIds(ids: Int32Array, blocks: number, what: string): void {
  for (let i = 0; i < ids.length; i++) {
    const id = ids[i]!;
    if (id < 0 || id >= blocks)
      throw new PdError('INTERNAL', `block ${id} is outside of ${what} of ${blocks} blocks`);
  }
}
