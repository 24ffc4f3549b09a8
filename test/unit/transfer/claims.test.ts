/** Who gets which tensor: of exactly its id between ours, and of peers that are not ours also under a random suffix. */
import { describe, expect, it } from 'vitest';
import { hostMemory } from '../../../src/device/memory.ts';
import type { PdError } from '../../../src/errors.ts';
import { type Claimant, ClaimBook } from '../../../src/transfer/frozen/claims.ts';
import { ReceiveStore, type StoreEntry } from '../../../src/transfer/frozen/store.ts';
import { suffixedFor, type TensorId, transferIdOf } from '../../../src/wire/ids.ts';

const collisions: string[][] = [];
const book = () => {
  collisions.length = 0;
  return new ClaimBook((_, ids) => collisions.push([...ids]));
};
const store = new ReceiveStore();
const received = (id: string, more: Partial<StoreEntry>): StoreEntry => {
  const held = { memory: hostMemory(0), bytes: 1, free: () => {} };
  const tensor = { tensorId: id as TensorId, shape: [1], dtype: 'uint8' as const, peer: 'p:1', ...more };
  const entry = store.open(tensor, held, 0);
  store.arrived(entry);
  return entry;
};
const ours = (id: string, promptDigest?: string) => received(id, { promptDigest });
const theirs = (id: string) => received(id, { standsFor: suffixedFor(id.slice(0, id.indexOf('#')), 'any') });

class Waiter implements Claimant {
  readonly transferId;
  readonly peer = 'p:1';
  readonly promptDigest: string | undefined;
  readonly got: string[] = [];
  failed: PdError | undefined;
  readonly #missing: Set<string>;

  constructor(id: string, layers = ['l0', 'l1'], promptDigest?: string) {
    this.transferId = transferIdOf(id);
    this.promptDigest = promptDigest;
    this.#missing = new Set(layers);
  }
  wants(layer: string): boolean {
    return !this.failed && this.#missing.has(layer);
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
    ['ours', ours, 'a-0', 'a-0'],
    ['ours', ours, 'order-20261128', 'order-20261128'],
    ['theirs', theirs, 'a-0', 'a-0'],
    ['theirs', theirs, 'a-0', 'a-0-89abcdef'],
    ['theirs', theirs, 'a-0-89abcdef', 'a-0-89abcdef'],
  ] as const)(
    '%s: waits for %s%s and gets the tensors of it, before and after it came',
    (_, from, wanted, sent) => {
      const claims = book();
      const waiter = new Waiter(wanted);
      claims.register(waiter, [from(`${sent}#l0`)]);
      expect(claims.arrived(from(`${sent}#l1`))).toBe(true);
      expect(waiter.got).toEqual([`${sent}#l0`, `${sent}#l1`]);
    },
  );

  it('does not get those of another index, layer or request', () => {
    const claims = book();
    const waiter = new Waiter('a-0');
    claims.register(waiter, []);
    for (const id of ['a-1#l0', 'a-0#l7', 'b-0#l0', 'a-0-1#l0', 'a-0-89abcdef#l0'])
      expect(claims.arrived(ours(id))).toBe(false);
    for (const id of ['a-1#l0', 'a-1-89abcdef#l0', 'a-0-89abcde#l0', 'a-0-89ABCDEF#l0'])
      expect(claims.arrived(theirs(id))).toBe(false);
    expect(waiter.got).toEqual([]);
  });

  it('takes all its layers from one request of the sender, and none where a second could be meant', () => {
    const claims = book();
    const waiter = new Waiter('a-0');
    claims.register(waiter, []);
    claims.arrived(theirs('a-0-11111111#l0'));
    expect(claims.arrived(theirs('a-0-22222222#l1'))).toBe(false);
    expect(waiter.failed?.code).toBe('KV_LOAD_FAILED');
    expect(waiter.failed?.message).toContain('a-0-11111111 and a-0-22222222');
    expect(collisions).toEqual([['a-0-11111111', 'a-0-22222222']]);
  });

  it('has KV of exactly its id first, whatever else comes', () => {
    const claims = book();
    const waiter = new Waiter('a-0');
    claims.register(waiter, [theirs('a-0-11111111#l0'), theirs('a-0#l0'), theirs('a-0-22222222#l0')]);
    expect(claims.arrived(theirs('a-0-11111111#l1'))).toBe(false);
    expect(claims.arrived(theirs('a-0#l1'))).toBe(true);
    expect([waiter.got, waiter.failed]).toEqual([['a-0#l0', 'a-0#l1'], undefined]);
  });

  it('fails where two could be meant before it came', () => {
    const claims = book();
    const waiter = new Waiter('a-0');
    claims.register(waiter, [theirs('a-0-11111111#l0'), theirs('a-0-22222222#l0')]);
    expect(waiter.got).toEqual([]);
    expect(waiter.failed?.message).toContain('a-0-11111111 and a-0-22222222');
  });

  it('keeps to one source for as long as its request lasts, and not for the next of its id', () => {
    const claims = book();
    const [first, second, third] = [['l0'], ['l1'], ['l1']].map((layers) => new Waiter('a-0', layers));
    claims.register(first!, [theirs('a-0-11111111#l0')]);
    claims.unregister(first!);
    claims.register(second!, [theirs('a-0-22222222#l1')]);
    claims.unregister(second!);
    claims.finish(transferIdOf('a-0'));
    claims.register(third!, [theirs('a-0-22222222#l1')]);
    expect([first, second, third].map((each) => each!.got)).toEqual([
      ['a-0-11111111#l0'],
      [],
      ['a-0-22222222#l1'],
    ]);
  });

  it('is told of KV of another prompt under its id', () => {
    const claims = book();
    const waiter = new Waiter('a-0', ['l0'], 'rome');
    claims.register(waiter, []);
    expect(claims.contradicted(ours('a-0#l0', 'paris'))).toEqual([waiter]);
    expect(claims.contradicted(ours('a-0#l0', 'rome'))).toEqual([]);
    expect(claims.contradicted(theirs('a-0#l0'))).toEqual([]);
    claims.complete(transferIdOf('a-0'));
    expect(claims.finish(transferIdOf('a-0'))).toEqual({ promptDigest: 'rome', complete: true });
    expect(claims.finish(transferIdOf('a-0'))).toEqual({ promptDigest: 'rome', complete: false });
    claims.unregister(waiter);
    claims.finish(transferIdOf('a-0'));
    expect(claims.finish(transferIdOf('a-0'))).toEqual({ promptDigest: undefined, complete: false });
  });
});

it('several receives of one request are no collision', () => {
  const claims = book();
  const waiters = ['l0', 'l1'].map((layer) => new Waiter('a-0', [layer]));
  for (const waiter of waiters) claims.register(waiter, []);
  for (const layer of ['l1', 'l0']) claims.arrived(ours(`a-0#${layer}`));
  expect(waiters.map((waiter) => waiter.got)).toEqual([['a-0#l0'], ['a-0#l1']]);
  expect(collisions).toEqual([]);
});
