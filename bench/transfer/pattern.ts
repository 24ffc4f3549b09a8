/**
 * The bytes that are moved, and what they must be on arrival: windows of one pseudo-random sequence that both processes generate. Each
 * layer of each round has its own window, so the byte at a place depends on layer, round, token and position, and a block, layer or
 * round in the wrong place cannot look right. Comparing is a memcmp of windows, fast enough to check every byte of gigabytes.
 */
import type { MemoryRef } from '../../src/device/device.ts';
import { sliceMemory } from '../../src/device/memory.ts';
import { PdError } from '../../src/errors.ts';
import { xorshift } from './shape.ts';

/** Windows begin at multiples of this, as device memory does. */
const STEP = 16;
/** A prime: consecutive streams have windows far apart, and that many streams all have different ones. */
const WINDOWS = 65_521;
const STRIDE = 7_919;

export class Pattern {
  /** Host or page-locked memory. */
  readonly memory: MemoryRef;
  readonly #bytes: Buffer;

  /** `memory` of `Pattern.bytes(largest)`, and a view of it; it is filled here. */
  constructor(memory: MemoryRef, view: Uint8Array) {
    this.memory = memory;
    this.#bytes = Buffer.from(view.buffer, view.byteOffset, view.byteLength);
    const words = new Uint32Array(view.buffer, view.byteOffset, Math.trunc(view.byteLength / 4));
    const next = xorshift(words.length);
    for (let at = 0; at < words.length; at++) words[at] = next();
  }

  /** Memory for windows of up to `largest` bytes. */
  static bytes(largest: number): number {
    return Math.ceil(largest / STEP) * STEP + WINDOWS * STEP;
  }

  /** What tensor `stream` is filled with: `bytes` from the start of its window. */
  window(stream: number, bytes: number): MemoryRef {
    return sliceMemory(this.memory, this.#offset(stream), bytes);
  }

  /** Compares `length` bytes of stream `stream` from `at` with `view` from `viewAt`; returns the first that differs, or -1. */
  differs(stream: number, at: number, view: Buffer, viewAt: number, length: number): number {
    const from = this.#offset(stream) + at;
    if (from + length > this.#bytes.length || viewAt + length > view.length) {
      throw new PdError('INTERNAL', `bytes ${at}+${length} are outside the pattern`);
    }
    if (this.#bytes.compare(view, viewAt, viewAt + length, from, from + length) === 0) return -1;
    for (let i = 0; i < length; i++) if (this.#bytes[from + i] !== view[viewAt + i]) return i;
    throw new PdError('INTERNAL', 'two buffers compare unequal but have no unequal byte');
  }

  #offset(stream: number): number {
    return ((stream * STRIDE) % WINDOWS) * STEP;
  }
}
