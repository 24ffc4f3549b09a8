import type { MemoryRef } from '../../device/device.ts';
import { totalBytes } from '../../device/memory.ts';
import { PdError } from '../../errors.ts';

const EMPTY = new Uint8Array(0);

/** Walks a list of host regions as one run of bytes. */
export class RegionCursor {
  readonly totalBytes: number;
  readonly #regions: readonly MemoryRef[];
  #region = 0;
  /** Into the current region. */
  #offset = 0;
  #position = 0;

  constructor(regions: readonly MemoryRef[]) {
    this.#regions = regions;
    this.totalBytes = totalBytes(regions);
  }

  /** Bytes passed so far. */
  get position(): number {
    return this.#position;
  }

  get remaining(): number {
    return this.totalBytes - this.#position;
  }

  /** The next contiguous bytes, at most `most`; empty at the end. */
  window(most: number): Uint8Array {
    for (;;) {
      const region = this.#regions[this.#region];
      if (!region) return EMPTY;
      if (region.kind !== 'host') {
        throw new PdError('INTERNAL', `the host transport cannot reach ${region.kind} memory`);
      }
      const left = region.bytes - this.#offset;
      // A view of the window alone: one over a whole region of more than 4 GiB would not be possible.
      if (left > 0) return new Uint8Array(region.buffer, region.offset + this.#offset, Math.min(left, most));
      this.#region++;
      this.#offset = 0;
    }
  }

  /** `bytes` of the window have been read or written. */
  advance(bytes: number): void {
    this.#offset += bytes;
    this.#position += bytes;
  }
}
