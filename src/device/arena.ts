/**
 * Hands out offsets in memory that is allocated once, because allocating and freeing device memory waits for the whole device. Best fit with
 * coalescing, O(log n). Pure: it never looks at the memory.
 *
 *   | used | free | used | used | free            |      blocks in address order, each knows its neighbours;
 *                                                        two free ones never touch
 */
import { PdError } from '../errors.ts';
import { FreeList } from './free-list.ts';

/** Offsets and sizes are multiples of this: wide enough for any vector load on a GPU. */
export const ARENA_ALIGNMENT = 256;

/** What `allocate` hands out, and `free` takes back. */
export interface Block {
  readonly offset: number;
  /** As asked for. */
  readonly bytes: number;
  /** As taken from the arena: rounded up to the alignment. */
  readonly size: number;
}

/** A run between two boundaries, in address order. */
interface Segment {
  readonly offset: number;
  size: number;
  free: boolean;
  previous: Segment | undefined;
  next: Segment | undefined;
}

export class Arena {
  /** Usable bytes: the size given, rounded down to the alignment. */
  readonly totalBytes: number;
  /** Always the one at 0: splitting keeps the lower part, joining the lower segment. */
  readonly #first: Segment;
  readonly #free = new FreeList<Segment>();
  readonly #held = new Map<Block, Segment>();
  #usedBytes = 0;

  constructor(totalBytes: number) {
    this.totalBytes = Math.floor(totalBytes / ARENA_ALIGNMENT) * ARENA_ALIGNMENT;
    this.#first = { offset: 0, size: this.totalBytes, free: true, previous: undefined, next: undefined };
    if (this.totalBytes > 0) this.#free.insert(this.#first);
  }

  /** Sum of `size` of all blocks held. */
  get usedBytes(): number {
    return this.#usedBytes;
  }

  /** Blocks held. */
  get blocks(): number {
    return this.#held.size;
  }

  /** The most that one `allocate` can get now. */
  get largestFree(): number {
    return this.#free.largest?.size ?? 0;
  }

  /** Undefined where no free run is long enough; the arena is then as before. */
  allocate(bytes: number): Block | undefined {
    const size = sizeOf(bytes);
    const segment = this.#free.bestFit(size);
    if (!segment) return undefined;
    this.#free.remove(segment);
    if (segment.size > size) this.#free.insert(cut(segment, size));
    segment.free = false;
    const block = { offset: segment.offset, bytes, size };
    this.#held.set(block, segment);
    this.#usedBytes += size;
    return block;
  }

  /** Throws INTERNAL for a block that this arena does not hold: freed before, or another's. */
  free(block: Block): void {
    const segment = this.#held.get(block);
    if (!segment) {
      throw new PdError('INTERNAL', `arena: block at ${block.offset} (${block.bytes} bytes) is not held`);
    }
    this.#held.delete(block);
    this.#usedBytes -= segment.size;
    segment.free = true;
    const { previous, next } = segment;
    if (next?.free) {
      this.#free.remove(next);
      joinNext(segment);
    }
    if (previous?.free) {
      this.#free.remove(previous);
      joinNext(previous);
      this.#free.insert(previous);
    } else {
      this.#free.insert(segment);
    }
  }

  /** What is wrong, in words; empty when all is well. Walks every block. */
  checkIntegrity(): string[] {
    const wrong: string[] = [];
    let at = 0;
    let used = 0;
    let held = 0;
    let largest = 0;
    for (let segment: Segment | undefined = this.#first; segment; segment = segment.next) {
      if (segment.offset !== at) wrong.push(`block at ${segment.offset} should be at ${at}`);
      if (segment.next && segment.next.previous !== segment)
        wrong.push(`links broken after ${segment.offset}`);
      if (segment.free && segment.next?.free) wrong.push(`two free blocks touch at ${segment.offset}`);
      if (segment.free) largest = Math.max(largest, segment.size);
      else {
        used += segment.size;
        held++;
      }
      at += segment.size;
    }
    if (at !== this.totalBytes) wrong.push(`blocks cover ${at} of ${this.totalBytes} bytes`);
    if (used !== this.#usedBytes) wrong.push(`${used} bytes are used, ${this.#usedBytes} are counted`);
    if (held !== this.#held.size) wrong.push(`${held} blocks are used, ${this.#held.size} are held`);
    if (largest !== this.largestFree) wrong.push(`largest free is ${largest}, listed ${this.largestFree}`);
    return wrong;
  }
}

/** Bytes as taken from an arena. */
function sizeOf(bytes: number): number {
  if (!Number.isSafeInteger(bytes) || bytes < 0) {
    throw new PdError('INTERNAL', `arena: ${bytes} is not a number of bytes`);
  }
  // At least one unit, so that no two blocks share an offset.
  return Math.max(Math.ceil(bytes / ARENA_ALIGNMENT), 1) * ARENA_ALIGNMENT;
}

/** Cuts `segment` to `size`; returns the rest. */
function cut(segment: Segment, size: number): Segment {
  const rest: Segment = {
    offset: segment.offset + size,
    size: segment.size - size,
    free: true,
    previous: segment,
    next: segment.next,
  };
  if (segment.next) segment.next.previous = rest;
  segment.next = rest;
  segment.size = size;
  return rest;
}

/** Takes the segment after `segment` into it. Sizes change, so neither may be in the free list meanwhile. */
function joinNext(segment: Segment): void {
  const gone = segment.next!;
  segment.size += gone.size;
  segment.next = gone.next;
  if (gone.next) gone.next.previous = segment;
}
