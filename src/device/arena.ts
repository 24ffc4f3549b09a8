/**
 * Hands out offsets in memory that is allocated once, because allocating and freeing device memory waits for the whole device. Best fit with
 * coalescing. Pure: it never looks at the memory.
 *
 *   | used | free | used | used | free            |      free runs are listed in address order; two never touch
 *
 * The list is walked, which costs nothing where runs are few, as they are: 2,000 of them cost some microseconds, 30,000 half a millisecond.
 */
import { PdError } from '../errors.ts';

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

interface FreeRun {
  offset: number;
  size: number;
}

export class Arena {
  /** Usable bytes: the size given, rounded down to the alignment. */
  readonly totalBytes: number;
  readonly #free: FreeRun[] = [];
  readonly #held = new Set<Block>();

  constructor(totalBytes: number) {
    this.totalBytes = Math.floor(totalBytes / ARENA_ALIGNMENT) * ARENA_ALIGNMENT;
    if (this.totalBytes > 0) this.#free.push({ offset: 0, size: this.totalBytes });
  }

  /** Blocks held. */
  get blocks(): number {
    return this.#held.size;
  }

  /** Undefined where no free run is long enough; the arena is then as before. */
  allocate(bytes: number): Block | undefined {
    const size = sizeOf(bytes);
    let best: FreeRun | undefined;
    for (const run of this.#free) {
      if (run.size >= size && (!best || run.size < best.size)) best = run;
    }
    if (!best) return undefined;
    const block = { offset: best.offset, bytes, size };
    this.#held.add(block);
    best.offset += size;
    best.size -= size;
    if (best.size === 0) this.#free.splice(this.#free.indexOf(best), 1);
    return block;
  }

  /** Throws INTERNAL for a block that this arena does not hold: freed before, or another's. */
  free(block: Block): void {
    if (!this.#held.delete(block)) {
      throw new PdError('INTERNAL', `arena: block at ${block.offset} (${block.bytes} bytes) is not held`);
    }
    const { offset, size } = block;
    const at = this.#firstBehind(offset);
    const [before, behind] = [this.#free[at - 1], this.#free[at]];
    const joinsBefore = before && before.offset + before.size === offset;
    const joinsBehind = behind && behind.offset === offset + size;
    if (joinsBefore) {
      before.size += size + (joinsBehind ? behind.size : 0);
      if (joinsBehind) this.#free.splice(at, 1);
    } else if (joinsBehind) {
      behind.offset = offset;
      behind.size += size;
    } else {
      this.#free.splice(at, 0, { offset, size });
    }
  }

  /** What is wrong, in words; empty when all is well. Walks every block. */
  checkIntegrity(): string[] {
    const wrong: string[] = [];
    const runs = [...this.#held, ...this.#free].sort((a, b) => a.offset - b.offset);
    const free = new Set<Block | FreeRun>(this.#free);
    let end = 0;
    let previous: Block | FreeRun | undefined;
    for (const run of runs) {
      if (run.offset !== end) wrong.push(`what begins at ${run.offset} should begin at ${end}`);
      if (previous && free.has(previous) && free.has(run)) {
        wrong.push(`two free runs touch at ${run.offset}`);
      }
      end = run.offset + run.size;
      previous = run;
    }
    if (end !== this.totalBytes) wrong.push(`blocks and free runs cover ${end} of ${this.totalBytes} bytes`);
    return wrong;
  }

  /** Index of the first free run behind `offset`. */
  #firstBehind(offset: number): number {
    let low = 0;
    let high = this.#free.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#free[middle]!.offset < offset) low = middle + 1;
      else high = middle;
    }
    return low;
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
