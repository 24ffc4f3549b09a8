import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type BlockHash, extendHashes } from '../../../src/kv/block-hash.ts';
import { type BlockCopy, BlockManager } from '../../../src/kv/block-manager.ts';

const BLOCK = 4;

function hashesOf(tokens: readonly number[]): BlockHash[] {
  const hashes: BlockHash[] = [];
  extendHashes(hashes, Int32Array.from(tokens), BLOCK);
  return hashes;
}

const range = (length: number, from = 0) => Array.from({ length }, (_, i) => from + i);

describe('block hash', () => {
  it('hangs on every token before it', () => {
    const [a0, a1] = hashesOf([1, 2, 3, 4, 5, 6, 7, 8, 9]);
    const [b0, b1] = hashesOf([9, 2, 3, 4, 5, 6, 7, 8]);
    expect(a0).not.toBe(b0);
    expect(a1).not.toBe(b1);
    expect(hashesOf([1, 2, 3, 4, 5, 6, 7, 8])).toEqual([a0, a1]);
  });

  it('keeps what it has when tokens are added', () => {
    const hashes = hashesOf(range(5));
    extendHashes(hashes, Int32Array.from(range(13)), BLOCK);
    expect(hashes).toEqual(hashesOf(range(13)));
    expect(hashes).toHaveLength(3);
  });
});

describe('BlockManager', () => {
  it('finds a prefix only after its KV was committed', () => {
    const blocks = new BlockManager(8, BLOCK);
    const hashes = hashesOf(range(10));
    const table = blocks.allocate('a', 10);
    expect(blocks.lookup(hashes, 10)).toEqual([]);
    blocks.commit('a', hashes, 7);
    expect(blocks.lookup(hashes, 10)).toEqual([table[0]]);
    blocks.commit('a', hashes, 10);
    expect(blocks.lookup(hashes, 10)).toEqual(table.slice(0, 2));
    expect(blocks.lookup(hashes, 7)).toEqual([table[0]]);
  });

  it('keeps no trace of blocks that were freed without a commit', () => {
    const blocks = new BlockManager(4, BLOCK);
    blocks.allocate('failed load', 16);
    blocks.free('failed load');
    expect(blocks.numCached).toBe(0);
    expect(blocks.lookup(hashesOf(range(16)), 16)).toEqual([]);
  });

  it('evicts what was used longest ago, and the tail of a prefix before its head', () => {
    const blocks = new BlockManager(4, BLOCK);
    const old = hashesOf(range(8));
    const young = hashesOf(range(8, 100));
    for (const [id, hashes] of Object.entries({ old, young })) {
      blocks.allocate(id, 8);
      blocks.commit(id, hashes, 8);
      blocks.free(id);
    }
    blocks.allocate('new', 4);
    expect(blocks.lookup(old, 8)).toHaveLength(1);
    expect(blocks.lookup(young, 8)).toHaveLength(2);
  });

  it('counts a cached free block as taken when it is shared', () => {
    const blocks = new BlockManager(3, BLOCK);
    const hashes = hashesOf(range(8));
    blocks.allocate('a', 8);
    blocks.commit('a', hashes, 8);
    blocks.free('a');
    const cached = blocks.lookup(hashes, 8);
    expect(cached).toHaveLength(2);
    expect(blocks.canAllocate(12, cached)).toBe(true);
    expect(blocks.canAllocate(12, cached, 1)).toBe(false);
    expect(blocks.canAllocate(16, cached)).toBe(false);
  });

  it('forks: shares full blocks, copies the partial one, and its source outlives the parent', () => {
    const blocks = new BlockManager(4, BLOCK);
    const parent = [...blocks.allocate('parent', 7)];
    const copy = blocks.fork('parent', 'child', 6);
    expect(copy).toEqual({ source: parent[1], target: blocks.tableOf('child')[1] });
    expect(blocks.tableOf('child')[0]).toBe(parent[0]);
    blocks.free('parent');
    expect(blocks.numUsed).toBe(3);
    blocks.releaseCopy(copy!);
    expect(blocks.numUsed).toBe(2);
    blocks.free('child');
    expect(blocks.numFree).toBe(4);
    expect(blocks.checkIntegrity()).toEqual([]);
  });

  it('refuses a double allocation and an allocation beyond what is free', () => {
    const blocks = new BlockManager(2, BLOCK);
    blocks.allocate('a', 4);
    expect(() => blocks.allocate('a', 4)).toThrow(/has blocks already/);
    expect(() => blocks.allocate('b', 8)).toThrow(/1 of 2 are free/);
    expect(() => blocks.tableOf('b')).toThrow(/has no blocks/);
  });

  it('keeps exposed blocks from everybody, their own sequence too, until they are retracted', () => {
    const blocks = new BlockManager(4, BLOCK);
    const hashes = hashesOf(range(12));
    const [, ...wanted] = blocks.allocate('loading', 12);
    blocks.expose('want 1', wanted);
    expect([blocks.numExposed, blocks.numQuarantined]).toEqual([2, 0]);
    blocks.commit('loading', hashes, 4);
    expect(() => blocks.commit('loading', hashes, 8)).toThrow(/may still be written to/);
    expect(() => blocks.fork('loading', 'other', 8)).toThrow(/may still be written to/);
    blocks.free('loading');
    expect([blocks.numQuarantined, blocks.numFree]).toEqual([2, 2]);
    expect(blocks.canAllocate(12)).toBe(false);
    expect(blocks.allocate('again', 8).filter((block) => wanted.includes(block))).toEqual([]);
    blocks.retract('want 1');
    expect([blocks.numExposed, blocks.numQuarantined, blocks.numFree]).toEqual([0, 0, 2]);
    expect(() => blocks.retract('want 1')).toThrow(/exposes no blocks/);
    expect(blocks.checkIntegrity()).toEqual([]);
  });

  it('hands blocks back to their sequence when what was asked for has come', () => {
    const blocks = new BlockManager(2, BLOCK);
    const hashes = hashesOf(range(8));
    blocks.expose('want', blocks.allocate('a', 8));
    blocks.retract('want');
    blocks.commit('a', hashes, 8);
    blocks.free('a');
    expect(blocks.lookup(hashes, 8)).toHaveLength(2);
  });

  it('exposes only what one sequence has for itself', () => {
    const blocks = new BlockManager(4, BLOCK);
    const hashes = hashesOf(range(4));
    const [shared = -1] = blocks.allocate('a', 4);
    blocks.commit('a', hashes, 4);
    expect(() => blocks.expose('cached', [shared])).toThrow(/cannot be exposed/);
    const [own = -1] = blocks.allocate('b', 4);
    expect(() => blocks.expose('twice', [own, own])).toThrow(/twice/);
    expect(() => blocks.expose('free', [3])).toThrow(/cannot be exposed/);
    blocks.expose('want', [own]);
    expect(() => blocks.expose('other', [own])).toThrow(/cannot be exposed/);
    expect(blocks.checkIntegrity()).toEqual([]);
  });

  it('leases the blocks of a prompt beyond the end of its sequence', () => {
    const blocks = new BlockManager(6, BLOCK);
    const table = [...blocks.allocate('a', 12)];
    blocks.lease('first', table.slice(0, 2));
    expect(blocks.leaseOf('first')).toEqual(table.slice(0, 2));
    expect(blocks.numFree).toBe(3);
    blocks.free('a');
    blocks.lease('second', blocks.allocate('b', 4));
    blocks.free('b');
    expect([blocks.numLeased, blocks.numLeases, blocks.numFree]).toEqual([3, 2, 3]);
    expect(() => blocks.lease('first', table.slice(0, 1))).toThrow(/leased already/);
    expect(() => blocks.lease('third', [5])).toThrow(/is free/);
    // a write that reads them goes on
    blocks.hold(table.slice(0, 1));
    blocks.endLease('first');
    blocks.endLease('first');
    expect(blocks.numFree).toBe(4);
    blocks.unhold(table.slice(0, 1));
    blocks.endLease('second');
    expect(blocks.numFree).toBe(6);
    expect(() => blocks.hold([0])).toThrow(/is free/);
    expect(blocks.checkIntegrity()).toEqual([]);
  });

  it('never loses a block, whatever is done in whatever order', () => {
    const operation = fc.record({
      kind: fc.constantFrom(
        'allocate',
        'append',
        'commit',
        'fork',
        'free',
        'copied',
        'expose',
        'retract',
        'lease',
        'end lease',
        'hold',
        'unhold',
      ),
      who: fc.nat(7),
      size: fc.integer({ min: 1, max: 24 }),
      family: fc.nat(2),
    });
    fc.assert(
      fc.property(fc.array(operation, { maxLength: 120 }), (operations) => {
        const blocks = new BlockManager(12, BLOCK);
        const alive = new Map<string, { tokens: number[]; length: number }>();
        const copies: BlockCopy[] = [];
        /** Blocks by want, and of which sequence. */
        const wants = new Map<string, { owner: string; blocks: readonly number[] }>();
        const leases: string[] = [];
        const holds: (readonly number[])[] = [];
        const isLoading = (owner: string) => [...wants.values()].some((want) => want.owner === owner);
        let serial = 0;
        for (const { kind, who, size, family } of operations) {
          const [id, sequence] = [...alive][who % Math.max(1, alive.size)] ?? [];
          if (kind === 'allocate') {
            const tokens = range(64, family * 1_000);
            const cached = blocks.lookup(hashesOf(tokens), size - 1);
            if (blocks.canAllocate(size, cached)) {
              const name = `s${serial++}`;
              blocks.allocate(name, size, cached);
              alive.set(name, { tokens, length: size });
            }
          } else if (kind === 'copied') {
            const copy = copies.pop();
            if (copy) blocks.releaseCopy(copy);
          } else if (kind === 'retract') {
            const [key] = [...wants.keys()];
            if (key !== undefined) blocks.retract(key);
            if (key !== undefined) wants.delete(key);
          } else if (kind === 'end lease') {
            const key = leases.shift();
            if (key !== undefined) blocks.endLease(key);
          } else if (kind === 'unhold') {
            const held = holds.pop();
            if (held) blocks.unhold(held);
          } else if (id !== undefined && sequence) {
            if (kind === 'free') {
              blocks.free(id);
              alive.delete(id);
            } else if (isLoading(id)) {
              // the others are refused
            } else if (kind === 'expose') {
              if (blocks.canAllocate(size)) {
                const name = `s${serial++}`;
                const wanted = [...blocks.allocate(name, size)];
                blocks.expose(`want ${name}`, wanted);
                wants.set(`want ${name}`, { owner: name, blocks: wanted });
                alive.set(name, { tokens: range(64, 9_000 + serial), length: size });
              }
            } else if (kind === 'lease') {
              const key = `lease ${serial++}`;
              blocks.lease(key, blocks.tableOf(id).slice(0, size));
              leases.push(key);
            } else if (kind === 'hold') {
              const held = blocks.tableOf(id).slice(0, size);
              blocks.hold(held);
              holds.push(held);
            } else if (kind === 'append' && blocks.canAppend(id, sequence.length + size)) {
              if (sequence.length + size <= 64) {
                sequence.length += size;
                blocks.append(id, sequence.length);
              }
            } else if (kind === 'commit') {
              blocks.commit(id, hashesOf(sequence.tokens), Math.min(size, sequence.length));
            } else if (kind === 'fork' && blocks.canFork(Math.min(size, sequence.length))) {
              const name = `s${serial++}`;
              const length = Math.min(size, sequence.length);
              const copy = blocks.fork(id, name, length);
              if (copy) copies.push(copy);
              alive.set(name, { tokens: sequence.tokens, length });
            }
          }
          expect(blocks.checkIntegrity()).toEqual([]);
          // nobody but the one that asked has a block that may be written to
          for (const { owner, blocks: wanted } of wants.values()) {
            for (const name of alive.keys()) {
              if (name === owner) continue;
              expect(blocks.tableOf(name).filter((block) => wanted.includes(block))).toEqual([]);
            }
          }
          expect(blocks.numExposed).toBe([...wants.values()].flatMap((want) => want.blocks).length);
          expect(blocks.numFree + blocks.numUsed).toBe(12);
        }
        for (const copy of copies) blocks.releaseCopy(copy);
        for (const held of holds) blocks.unhold(held);
        for (const key of leases) blocks.endLease(key);
        for (const key of wants.keys()) blocks.retract(key);
        for (const id of alive.keys()) blocks.free(id);
        expect(blocks.numFree).toBe(12);
        expect(blocks.checkIntegrity()).toEqual([]);
      }),
      { numRuns: 200 },
    );
  });
});
