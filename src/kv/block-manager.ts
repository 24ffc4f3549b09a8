/**
 * Who has which block of the paged KV cache. Pure: it knows block numbers, not memory.
 *
 *   empty ----take----> used (refs > 0) ----last release, never committed----> empty
 *                         ^   |
 *                  lookup |   | last release, committed
 *                         |   v
 *                       evictable (least recently used first) --take--> used, its cache entry forgotten
 *
 * A block enters the prefix cache only by `commit`, when its KV is really there: a load that fails leaves nothing behind.
 */
import { PdError } from '../errors.ts';
import type { BlockHash } from './block-hash.ts';

export interface BlockCopy {
  readonly source: number;
  readonly target: number;
}

interface BlockTable {
  readonly blocks: number[];
  /** Leading blocks that `commit` has dealt with. */
  committed: number;
}

export class BlockManager {
  readonly numBlocks: number;
  /** Tokens per block. */
  readonly blockSize: number;
  readonly #refs: Int32Array;
  readonly #hashOf: (BlockHash | undefined)[];
  readonly #cached = new Map<BlockHash, number>();
  readonly #empty: number[] = [];
  /** Free but cached; a Set keeps insertion order, so the first is the least recently used. */
  readonly #evictable = new Set<number>();
  readonly #tables = new Map<string, BlockTable>();
  /** References that belong to no table: sources of copies not made yet. */
  readonly #holds = new Map<number, number>();

  constructor(numBlocks: number, blockSize: number) {
    this.numBlocks = numBlocks;
    this.blockSize = blockSize;
    this.#refs = new Int32Array(numBlocks);
    this.#hashOf = new Array<BlockHash | undefined>(numBlocks).fill(undefined);
    for (let block = numBlocks - 1; block >= 0; block--) this.#empty.push(block);
  }

  get numFree(): number {
    return this.#empty.length + this.#evictable.size;
  }

  get numUsed(): number {
    return this.numBlocks - this.numFree;
  }

  /** Free blocks that still hold KV a later prompt may find. */
  get numCached(): number {
    return this.#evictable.size;
  }

  blocksFor(numTokens: number): number {
    return Math.ceil(numTokens / this.blockSize);
  }

  has(id: string): boolean {
    return this.#tables.has(id);
  }

  /** Blocks of a sequence, in order. */
  tableOf(id: string): readonly number[] {
    return this.#table(id).blocks;
  }

  /** Leading blocks found in the prefix cache, within the first `maxTokens` tokens. */
  lookup(hashes: readonly BlockHash[], maxTokens: number): readonly number[] {
    const limit = Math.min(hashes.length, Math.floor(maxTokens / this.blockSize));
    const found: number[] = [];
    for (let i = 0; i < limit; i++) {
      const block = this.#cached.get(hashes[i]!);
      if (block === undefined) break;
      found.push(block);
    }
    return found;
  }

  /** Whether `allocate` would find its blocks and leave `reserve` free ones. `cached` as `lookup` answered. */
  canAllocate(numTokens: number, cached: readonly number[] = [], reserve = 0): boolean {
    const revived = cached.reduce((count, block) => count + (this.#refs[block] === 0 ? 1 : 0), 0);
    return this.blocksFor(numTokens) - cached.length + revived + reserve <= this.numFree;
  }

  /** A table for `numTokens` tokens that begins with the cached blocks. */
  allocate(id: string, numTokens: number, cached: readonly number[] = []): readonly number[] {
    if (this.#tables.has(id)) throw new PdError('INTERNAL', `${id} has blocks already`);
    if (!this.canAllocate(numTokens, cached)) throw this.#exhausted(id, this.blocksFor(numTokens));
    for (const block of cached) this.#retain(block);
    const blocks = [...cached];
    while (blocks.length < this.blocksFor(numTokens)) blocks.push(this.#take());
    this.#tables.set(id, { blocks, committed: cached.length });
    return blocks;
  }

  /** Whether the table of `id` can grow to `numTokens` tokens. */
  canAppend(id: string, numTokens: number): boolean {
    return this.blocksFor(numTokens) - this.#table(id).blocks.length <= this.numFree;
  }

  append(id: string, numTokens: number): void {
    if (!this.canAppend(id, numTokens)) throw this.#exhausted(id, this.blocksFor(numTokens));
    const { blocks } = this.#table(id);
    while (blocks.length < this.blocksFor(numTokens)) blocks.push(this.#take());
  }

  canFork(numTokens: number): boolean {
    return numTokens % this.blockSize === 0 || this.numFree > 0;
  }

  /**
   * A table for `child` with the first `numTokens` tokens of `parent`: full blocks shared, a partial one to be copied. The copy's source
   * is held, so that it outlives the parent; `releaseCopy` once it is made or given up.
   */
  fork(parent: string, child: string, numTokens: number): BlockCopy | undefined {
    const full = Math.floor(numTokens / this.blockSize);
    const { blocks, committed } = this.#table(parent);
    if (this.#tables.has(child)) throw new PdError('INTERNAL', `${child} has blocks already`);
    if (!this.canFork(numTokens)) throw this.#exhausted(child, 1);
    const shared = blocks.slice(0, full);
    for (const block of shared) this.#retain(block);
    const table: BlockTable = { blocks: shared, committed: Math.min(committed, full) };
    this.#tables.set(child, table);
    if (numTokens % this.blockSize === 0) return undefined;
    const source = blocks[full];
    if (source === undefined) throw new PdError('INTERNAL', `${parent} has no block ${full} to fork`);
    this.#retain(source);
    this.#holds.set(source, (this.#holds.get(source) ?? 0) + 1);
    const target = this.#take();
    table.blocks.push(target);
    return { source, target };
  }

  releaseCopy(copy: BlockCopy): void {
    const holds = this.#holds.get(copy.source) ?? 0;
    if (holds === 0) throw new PdError('INTERNAL', `block ${copy.source} is not held for a copy`);
    if (holds === 1) this.#holds.delete(copy.source);
    else this.#holds.set(copy.source, holds - 1);
    this.#release(copy.source);
  }

  /** The KV of the first `numTokens` tokens is there: their full blocks may be found by others. `hashes` covers at least those. */
  commit(id: string, hashes: readonly BlockHash[], numTokens: number): void {
    const table = this.#table(id);
    const full = Math.min(hashes.length, Math.floor(numTokens / this.blockSize));
    for (; table.committed < full; table.committed++) {
      const block = table.blocks[table.committed]!;
      const hash = hashes[table.committed]!;
      // Two that computed one prompt side by side: the first stays, the other's blocks are plain ones.
      if (this.#hashOf[block] !== undefined || this.#cached.has(hash)) continue;
      this.#hashOf[block] = hash;
      this.#cached.set(hash, block);
    }
  }

  /** Gives the table's references back; does nothing where there is none. */
  free(id: string): void {
    const table = this.#tables.get(id);
    if (!table) return;
    this.#tables.delete(id);
    // From the end: the tail of a prefix is of no use without its head, so it is evicted first.
    for (let i = table.blocks.length - 1; i >= 0; i--) this.#release(table.blocks[i]!);
  }

  /** Every table's id; for integrity checks. */
  owners(): IterableIterator<string> {
    return this.#tables.keys();
  }

  /** What is wrong, in words; empty when all is well. */
  checkIntegrity(): string[] {
    const problems: string[] = [];
    const refs = new Int32Array(this.numBlocks);
    for (const [id, { blocks }] of this.#tables) {
      if (new Set(blocks).size !== blocks.length) problems.push(`${id} has a block twice`);
      for (const block of blocks) refs[block] = refs[block]! + 1;
    }
    for (const [block, count] of this.#holds) refs[block] = refs[block]! + count;
    const empty = new Set(this.#empty);
    if (empty.size !== this.#empty.length) problems.push('a block is in the free list twice');
    for (let block = 0; block < this.numBlocks; block++) {
      const hash = this.#hashOf[block];
      const places = Number(refs[block]! > 0) + Number(empty.has(block)) + Number(this.#evictable.has(block));
      if (places !== 1) problems.push(`block ${block} is in ${places} places`);
      if (refs[block] !== this.#refs[block]) {
        problems.push(`block ${block} has ${this.#refs[block]} references counted, ${refs[block]} held`);
      }
      if (hash !== undefined && this.#cached.get(hash) !== block)
        problems.push(`block ${block} lost its entry`);
      if (hash !== undefined && empty.has(block)) problems.push(`block ${block} is empty and cached`);
      if (hash === undefined && this.#evictable.has(block))
        problems.push(`block ${block} is kept for nothing`);
    }
    for (const [hash, block] of this.#cached) {
      if (this.#hashOf[block] !== hash)
        problems.push(`a cache entry names block ${block}, which holds another`);
    }
    return problems;
  }

  #table(id: string): BlockTable {
    const table = this.#tables.get(id);
    if (!table) throw new PdError('INTERNAL', `${id} has no blocks`);
    return table;
  }

  #take(): number {
    const block = this.#empty.pop() ?? this.#evictable.values().next().value;
    if (block === undefined) throw this.#exhausted('the caller', 1);
    this.#evictable.delete(block);
    const hash = this.#hashOf[block];
    if (hash !== undefined) {
      this.#cached.delete(hash);
      this.#hashOf[block] = undefined;
    }
    this.#refs[block] = 1;
    return block;
  }

  #retain(block: number): void {
    this.#evictable.delete(block);
    this.#refs[block] = this.#refs[block]! + 1;
  }

  #release(block: number): void {
    const refs = this.#refs[block]! - 1;
    if (refs < 0) throw new PdError('INTERNAL', `block ${block} was freed twice`);
    this.#refs[block] = refs;
    if (refs > 0) return;
    if (this.#hashOf[block] === undefined) this.#empty.push(block);
    else this.#evictable.add(block);
  }

  #exhausted(id: string, wanted: number): PdError {
    return new PdError(
      'INTERNAL',
      `${id} needs ${wanted} KV blocks in all, ${this.numFree} of ${this.numBlocks} are free`,
    );
  }
}
