/**
 * Blocks in the order in which they came, each at most once. Pure. A Set keeps that order too, but its first entry is found by walking
 * over all that have been deleted before it: 2 ms for the 137 blocks of a prompt, in a cache of 25,000.
 */

const NOWHERE = -1;

export class BlockQueue {
  /** Neighbours by block; the entry behind the last block is the ring's own end, before its first and behind its last. */
  readonly #next: Int32Array;
  readonly #previous: Int32Array;
  readonly #end: number;
  #size = 0;

  constructor(numBlocks: number) {
    this.#end = numBlocks;
    this.#next = new Int32Array(numBlocks + 1).fill(NOWHERE);
    this.#previous = new Int32Array(numBlocks + 1).fill(NOWHERE);
    this.#next[numBlocks] = numBlocks;
    this.#previous[numBlocks] = numBlocks;
  }

  get size(): number {
    return this.#size;
  }

  /** The one that has been here longest. */
  get first(): number | undefined {
    return this.#size === 0 ? undefined : this.#next[this.#end]!;
  }

  has(block: number): boolean {
    return this.#next[block] !== NOWHERE;
  }

  /** Behind all others. `block` is not here. */
  add(block: number): void {
    const last = this.#previous[this.#end]!;
    this.#link(last, block);
    this.#link(block, this.#end);
    this.#size++;
  }

  /** Does nothing where it is not here. */
  delete(block: number): void {
    if (!this.has(block)) return;
    this.#link(this.#previous[block]!, this.#next[block]!);
    this.#next[block] = NOWHERE;
    this.#previous[block] = NOWHERE;
    this.#size--;
  }

  #link(before: number, after: number): void {
    this.#next[before] = after;
    this.#previous[after] = before;
  }
}
