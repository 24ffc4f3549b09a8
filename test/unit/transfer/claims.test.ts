/** Who gets which tensor when ids have random suffixes, and what happens when two requests share a transfer id. */
import { describe, expect, it } from 'vitest';
import { hostMemory } from '../../../src/device/memory.ts';
import type { PdError } from '../../../src/errors.ts';
import { type Claimant, ClaimBook } from '../../../src/transfer/claims.ts';
import { ReceiveStore, type StoreEntry } from '../../../src/transfer/store.ts';
import { type TensorId, transferIdOf } from '../../../src/wire/ids.ts';

const collisions: string[][] = [];
const book = () => {
  collisions.length = 0;
  return new ClaimBook((_, ids) => collisions.push([...ids]));
};
const store = new ReceiveStore();
const tensor = (id: string): StoreEntry => {
  const held = { memory: hostMemory(0), bytes: 1, free: () => {} };
  const entry = store.open({ tensorId: id as TensorId, shape: [1], dtype: 'uint8', peer: 'p:1' }, held, 0);
  store.arrived(entry);
  return entry;
};

class Waiter implements Claimant {
  readonly requestId: string;
  readonly transferId;
  readonly peer = 'p:1';
  readonly got: string[] = [];
  failed: PdError | undefined;
  readonly #missing: Set<string>;

  constructor(requestId: string, layers = ['l0', 'l1']) {
    this.requestId = requestId;
    this.transferId = transferIdOf(requestId);
    this.#missing = new Set(layers);
  }
  wants(layer: string): boolean {
    return this.#missing.has(layer);
  }
  take(entry: StoreEntry): void {
    this.#missing.delete(entry.layerName);
    this.got.push(entry.tensorId);
  }
  fail(reason: PdError): void {
    this.failed = reason;
  }
}

describe('a claimant', () => {
  it.each([
    ['a-0-0123abcd', 'a-0-0123abcd'],
    ['a-0-0123abcd', 'a-0'],
    ['a-0-0123abcd', 'a-0-89abcdef'],
    ['a-0', 'a-0-89abcdef'],
    ['a-0-89abcdef-0123abcd', 'a-0-89abcdef'],
  ])('%s gets the tensors of %s, before and after it came', (wanted, sent) => {
    const claims = book();
    const waiter = new Waiter(wanted);
    claims.register(waiter, [tensor(`${sent}#l0`)]);
    expect(claims.arrived(tensor(`${sent}#l1`))).toBe(true);
    expect(waiter.got).toEqual([`${sent}#l0`, `${sent}#l1`]);
  });

  it('does not get those of another index, layer or request', () => {
    const claims = book();
    const waiter = new Waiter('a-0-0123abcd');
    claims.register(waiter, []);
    for (const id of ['a-1#l0', 'a-0#l7', 'b-0#l0', 'a-0-1#l0'])
      expect(claims.arrived(tensor(id))).toBe(false);
    expect(waiter.got).toEqual([]);
  });

  it('takes all its layers from one request of the sender', () => {
    const claims = book();
    const waiter = new Waiter('a-0-0123abcd');
    claims.register(waiter, []);
    claims.arrived(tensor('a-0-11111111#l0'));
    expect(claims.arrived(tensor('a-0-22222222#l1'))).toBe(false);
    expect(claims.arrived(tensor('a-0-11111111#l1'))).toBe(true);
    expect([...claims.takeSources('a-0')]).toEqual(['a-0-11111111']);
  });
});

describe('two requests that share a transfer id', () => {
  it('are noticed, and the second gets only what carries its full id', () => {
    const claims = book();
    const [first, second] = [new Waiter('a-0-11111111'), new Waiter('a-0-22222222')];
    claims.register(first, []);
    claims.register(second, []);
    expect(collisions).toEqual([['a-0-11111111', 'a-0-22222222']]);
    claims.arrived(tensor('a-0#l0'));
    claims.arrived(tensor('a-0#l1'));
    claims.arrived(tensor('a-0-22222222#l0'));
    expect(first.got).toEqual(['a-0#l0', 'a-0#l1']);
    expect(second.got).toEqual(['a-0-22222222#l0']);
  });

  it('fail a load that cannot tell which is meant', () => {
    const claims = book();
    const waiter = new Waiter('a-0-33333333');
    claims.register(waiter, [tensor('a-0-11111111#l0'), tensor('a-0-22222222#l0')]);
    expect(waiter.got).toEqual([]);
    expect(waiter.failed?.code).toBe('KV_LOAD_FAILED');
    expect(waiter.failed?.message).toContain('a-0-11111111 and a-0-22222222');
    expect(claims.all()).toEqual([]);
  });

  it('several receives of one request are no collision', () => {
    const claims = book();
    const waiters = ['l0', 'l1'].map((layer) => new Waiter('a-0-11111111', [layer]));
    for (const waiter of waiters) claims.register(waiter, []);
    for (const layer of ['l1', 'l0']) claims.arrived(tensor(`a-0#${layer}`));
    expect(waiters.map((waiter) => waiter.got)).toEqual([['a-0#l0'], ['a-0#l1']]);
    expect(collisions).toEqual([]);
  });
});
