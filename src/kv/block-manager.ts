/**
 * Who has which block of the paged KV cache. Pure: it knows block numbers, not memory.
 *
 *   empty ----take----> used (refs > 0) ----last release, never committed----> empty
 *                         ^   |
 *                  lookup |   | last release, committed
 *                         |   v
 *                       evictable (least recently used first) --take--> used, its cache entry forgotten
 *
 * A block enters the prefix cache only by `commit`, once its KV is really there: a failed load leaves nothing behind.
 *
 * Four kinds of owners hold references: tables of sequences; holds, for what still reads a block (a copy, a write that is under way to
 * another worker); leases, for KV of a sequence that has ended and that a consumer may yet ask for; and exposures, for blocks that another
 * process may write to:
 *
 *   table --expose--> table + exposed --retract--> table            what was asked for has come, or will not
 *                        |
 *                        | free (abort, deadline, recompute)
 *                        v
 *                    quarantine --retract--> empty                  a write may still come: nobody gets the block until none can
 */
import { PdError } from '../errors.ts';
import type { BlockHash } from './block-hash.ts';
import { BlockQueue } from './block-queue.ts';

export interface BlockCopy {
  readonly source: number;
  readonly target: number;
}

/** Neighbours in a table: from block `first` up to, without, `end`. */
export interface BlockRun {
  readonly first: number;
  readonly end: number;
}

const NO_RUNS: readonly BlockRun[] = [];

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
  /** Free but cached, the least recently used first. */
  readonly #evictable: BlockQueue;
  readonly #tables = new Map<string, BlockTable>();
  /** References that belong to no table: sources of copies not made yet, and of writes that have not landed. */
  readonly #holds = new Map<number, number>();
  readonly #leases = new Map<string, readonly number[]>();
  readonly #exposures = new Map<string, readonly number[]>();
  readonly #exposed = new Set<number>();

  readonly #onEvicted: (hash: BlockHash) => void;

  /** `onEvicted`: told of what leaves the prefix cache, as it does. */
  constructor(numBlocks: number, blockSize: number, onEvicted: (hash: BlockHash) => void = () => {}) {
    this.numBlocks = numBlocks;
    this.blockSize = blockSize;
    this.#onEvicted = onEvicted;
    this.#evictable = new BlockQueue(numBlocks);
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

  /** Blocks that another process may write to, those in quarantine among them. */
  get numExposed(): number {
    return this.#exposed.size;
  }

  /** Exposed blocks that belong to no table any more: of no use to anyone until they are retracted. */
  get numQuarantined(): number {
    let count = 0;
    for (const block of this.#exposed) if (this.#refs[block] === 1) count++;
    return count;
  }

  /** Blocks under a lease; one that sequences use too is among them. */
  get numLeased(): number {
    const leased = new Set<number>();
    for (const blocks of this.#leases.values()) for (const block of blocks) leased.add(block);
    return leased.size;
  }

  get numLeases(): number {
    return this.#leases.size;
  }

  /** Something other than sequences holds blocks, and will give them back by itself. */
  get isShared(): boolean {
    return this.#leases.size + this.#exposures.size + this.#holds.size > 0;
  }

  blocksFor(numTokens: number): number {
    return Math.ceil(numTokens / this.blockSize);
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

  /** How many more free blocks `allocate` would need to leave `reserve` of them; 0 or less: none. `cached` as returned by `lookup`. */
  missing(numTokens: number, cached: readonly number[] = [], reserve = 0): number {
    const revived = cached.reduce((count, block) => count + (this.#refs[block] === 0 ? 1 : 0), 0);
    return this.blocksFor(numTokens) - cached.length + revived + reserve - this.numFree;
  }

  /** Whether `allocate` would find its blocks and leave `reserve` free ones. */
  canAllocate(numTokens: number, cached: readonly number[] = [], reserve = 0): boolean {
    return this.missing(numTokens, cached, reserve) <= 0;
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
    this.#refuseExposed(blocks.slice(0, this.blocksFor(numTokens)), `${parent} cannot be forked`);
    for (const block of shared) this.#retain(block);
    const table: BlockTable = { blocks: shared, committed: Math.min(committed, full) };
    this.#tables.set(child, table);
    if (numTokens % this.blockSize === 0) return undefined;
    const source = blocks[full];
    if (source === undefined) throw new PdError('INTERNAL', `${parent} has no block ${full} to fork`);
    this.hold([source]);
    const target = this.#take();
    table.blocks.push(target);
    return { source, target };
  }

  releaseCopy(copy: BlockCopy): void {
    this.unhold([copy.source]);
  }

  /** Keeps `blocks`, which have owners, from being taken until as many `unhold`: something reads them, whatever becomes of those owners. */
  hold(blocks: readonly number[]): void {
    for (const block of blocks) {
      if (!this.#refs[block]) throw new PdError('INTERNAL', `block ${block} is free and cannot be held`);
      this.#retain(block);
      this.#holds.set(block, (this.#holds.get(block) ?? 0) + 1);
    }
  }

  unhold(blocks: readonly number[]): void {
    for (const block of blocks) {
      const holds = this.#holds.get(block) ?? 0;
      if (holds === 0) throw new PdError('INTERNAL', `block ${block} is not held`);
      if (holds === 1) this.#holds.delete(block);
      else this.#holds.set(block, holds - 1);
      this.#release(block);
    }
  }

  /**
   * `blocks`, in the order of their prompt, stay under the lease `key` until `endLease`, whatever becomes of the sequence that has them now.
   */
  lease(key: string, blocks: readonly number[]): void {
    if (this.#leases.has(key)) throw new PdError('INTERNAL', `${key} is leased already`);
    this.#refuseExposed(blocks, `${key} cannot be leased`);
    for (const block of blocks) {
      if (!this.#refs[block]) throw new PdError('INTERNAL', `block ${block} is free and cannot be leased`);
    }
    for (const block of blocks) this.#retain(block);
    this.#leases.set(key, [...blocks]);
  }

  /** Blocks of a lease, in the order of the prompt. */
  leaseOf(key: string): readonly number[] | undefined {
    return this.#leases.get(key);
  }

  /** Does nothing if there is none. */
  endLease(key: string): void {
    const blocks = this.#leases.get(key);
    if (!blocks) return;
    this.#leases.delete(key);
    for (let i = blocks.length - 1; i >= 0; i--) this.#release(blocks[i]!);
  }

  /**
   * Another process may write to these blocks from now on, until `retract`. They belong to one table, and hold nothing that another may
   * find. Whatever happens to that table, they go to nobody else meanwhile, and cannot be committed or forked.
   */
  expose(key: string, blocks: readonly number[]): void {
    if (this.#exposures.has(key)) throw new PdError('INTERNAL', `${key} has exposed blocks already`);
    for (const block of blocks) {
      if (this.#refs[block] !== 1 || this.#hashOf[block] !== undefined || this.#holds.has(block)) {
        throw new PdError(
          'INTERNAL',
          `block ${block} is not one sequence's alone and cannot be exposed for ${key}`,
        );
      }
    }
    if (new Set(blocks).size !== blocks.length) throw new PdError('INTERNAL', `${key} exposes a block twice`);
    for (const block of blocks) {
      this.#retain(block);
      this.#exposed.add(block);
    }
    this.#exposures.set(key, [...blocks]);
  }

  /** Nothing can be written for `key` any more: its blocks are their table's alone, and free where they were in quarantine. */
  retract(key: string): void {
    const blocks = this.#exposures.get(key);
    if (!blocks) throw new PdError('INTERNAL', `${key} exposes no blocks`);
    this.#exposures.delete(key);
    for (const block of blocks) {
      this.#exposed.delete(block);
      this.#release(block);
    }
  }

  /**
   * The KV of the first `numTokens` tokens is there: their full blocks may be found by others. `hashes` covers at least those. Returns
   * which of them the prefix cache did not have.
   */
  commit(id: string, hashes: readonly BlockHash[], numTokens: number): readonly BlockRun[] {
    const table = this.#table(id);
    const full = Math.min(hashes.length, Math.floor(numTokens / this.blockSize));
    if (table.committed >= full) return NO_RUNS;
    this.#refuseExposed(table.blocks.slice(table.committed, full), `${id} cannot be committed`);
    const runs: { first: number; end: number }[] = [];
    for (; table.committed < full; table.committed++) {
      const block = table.blocks[table.committed]!;
      const hash = hashes[table.committed]!;
      // Two that computed one prompt side by side: the first stays, the other's blocks are plain ones.
      if (this.#hashOf[block] !== undefined || this.#cached.has(hash)) continue;
      this.#hashOf[block] = hash;
      this.#cached.set(hash, block);
      const last = runs.at(-1);
      if (last?.end === table.committed) last.end++;
      else runs.push({ first: table.committed, end: table.committed + 1 });
    }
    return runs;
  }

  /** Gives the table's references back; does nothing if there is none. */
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
    for (const blocks of this.#leases.values()) for (const block of blocks) refs[block] = refs[block]! + 1;
    const exposed = new Set<number>();
    for (const [key, blocks] of this.#exposures) {
      for (const block of blocks) {
        if (exposed.has(block)) problems.push(`block ${block} is exposed twice, for ${key} too`);
        if (!this.#exposed.has(block)) problems.push(`block ${block} of ${key} is not marked as exposed`);
        if (this.#hashOf[block] !== undefined)
          problems.push(`block ${block} of ${key} is exposed and cached`);
        if (refs[block]! > 1)
          problems.push(`block ${block} of ${key} is exposed and has ${refs[block]} users`);
        exposed.add(block);
      }
    }
    for (const block of exposed) refs[block] = refs[block]! + 1;
    if (exposed.size !== this.#exposed.size) problems.push('a block is marked as exposed and is not');
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

  #refuseExposed(blocks: readonly number[], what: string): void {
    if (this.#exposed.size === 0) return;
    for (const block of blocks) {
      if (this.#exposed.has(block)) {
        throw new PdError('INTERNAL', `${what}: block ${block} may still be written to`);
      }
    }
  }

  #take(): number {
    const block = this.#empty.pop() ?? this.#evictable.first;
    if (block === undefined) throw this.#exhausted('the caller', 1);
    this.#evictable.delete(block);
    const hash = this.#hashOf[block];
    if (hash !== undefined) {
      this.#cached.delete(hash);
      this.#hashOf[block] = undefined;
      this.#onEvicted(hash);
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
