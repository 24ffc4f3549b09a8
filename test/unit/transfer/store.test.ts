/** The books of received and of kept KV, driven at random: what is counted is what is held, and nothing is freed twice. */
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { hostMemory } from '../../../src/device/memory.ts';
import { type KeptTensor, SendStore } from '../../../src/transfer/frozen/send-store.ts';
import { ReceiveStore, type StoreEntry } from '../../../src/transfer/frozen/store.ts';
import { suffixedFor, type TensorId, transferIdOf } from '../../../src/wire/ids.ts';

/** Memory that fails a second free, and a total of what is out. */
function bank() {
  let out = 0;
  const memory = hostMemory(0);
  return {
    get out() {
      return out;
    },
    take(bytes: number) {
      out += bytes;
      let held = true;
      return {
        memory,
        bytes,
        free() {
          if (!held) throw new Error('freed twice');
          held = false;
          out -= bytes;
        },
      };
    },
  };
}

function bytesOf(tensors: readonly { readonly held: { readonly bytes: number } }[]): number {
  return tensors.reduce((sum, { held }) => sum + held.bytes, 0);
}

const requests = ['a-0', 'a-0-0123abcd', 'a-0-89abcdef', 'b-1', 'b-1-0123abcd'];
const ids = fc.constantFrom(...requests);
const layers = fc.constantFrom('l0', 'l1');
const operation = fc.oneof(
  fc.record({
    op: fc.constant('open' as const),
    id: ids,
    layer: layers,
    bytes: fc.nat(100),
    drop: fc.boolean(),
    foreign: fc.boolean(),
  }),
  fc.record({
    op: fc.constantFrom('arrive', 'claim', 'own', 'release', 'send', 'fetched', 'failed'),
    pick: fc.nat(),
  }),
  fc.record({ op: fc.constant('finish' as const), id: fc.constantFrom('a-0', 'b-1', ...requests) }),
  fc.record({ op: fc.constantFrom('orphans' as const, 'evict' as const), age: fc.nat(20) }),
);

it('holds exactly what it counts, whatever comes', () => {
  fc.assert(
    fc.property(fc.array(operation, { maxLength: 60 }), (operations) => {
      const money = bank();
      const store = new ReceiveStore();
      const entries: StoreEntry[] = [];
      let now = 0;
      for (const operation of operations) {
        now++;
        const picked = 'pick' in operation ? entries[operation.pick % entries.length] : undefined;
        switch (operation.op) {
          case 'open': {
            const tensorId = `${operation.id}#${operation.layer}` as TensorId;
            if (!operation.drop && store.get(tensorId)) break;
            const standsFor = operation.foreign ? suffixedFor(operation.id, 'any') : undefined;
            const tensor = {
              tensorId,
              shape: [operation.bytes],
              dtype: 'uint8' as const,
              peer: 'p:1',
              standsFor,
            };
            entries.push(
              store.open(tensor, money.take(operation.bytes), now, operation.drop ? 'dropped' : 'receiving'),
            );
            break;
          }
          case 'arrive':
            if (picked?.state === 'receiving' || picked?.state === 'dropped') store.arrived(picked);
            break;
          case 'claim':
            if (picked?.state === 'ready') store.claim(picked, 'claimed');
            break;
          case 'own':
            if (picked?.state === 'ready') store.claim(picked, 'owned');
            break;
          case 'release':
            if (picked) store.release(picked);
            break;
          case 'finish':
            store.finish(operation.id);
            for (const left of store.find(operation.id)) {
              const mine = left.requestId === operation.id || left.standsFor === operation.id;
              expect(mine && left.state !== 'claimed').toBe(false);
            }
            break;
          case 'orphans':
            for (const entry of store.freeOrphans(now - operation.age)) expect(entry.state).toBe('freed');
            break;
          default:
            break;
        }
        const held = entries.filter(({ state }) => state !== 'freed');
        expect([store.size, money.out]).toEqual([held.length, bytesOf(held)]);
        expect(store.checkIntegrity()).toEqual([]);
      }
      for (const entry of entries) store.release(entry);
      expect([store.size, money.out]).toEqual([0, 0]);
    }),
  );
});

it('keeps for asking, and never frees what is being sent', () => {
  fc.assert(
    fc.property(fc.array(operation, { maxLength: 60 }), (operations) => {
      const money = bank();
      const store = new SendStore();
      const sends: KeptTensor[] = [];
      const freed = new Set<KeptTensor>();
      const kept: KeptTensor[] = [];
      let now = 0;
      for (const operation of operations) {
        now++;
        switch (operation.op) {
          case 'open': {
            const held = money.take(operation.bytes);
            const tensor: KeptTensor = store.keep(
              {
                tensorId: `${operation.id}#${operation.layer}` as TensorId,
                shape: [operation.bytes],
                dtype: 'uint8',
              },
              {
                ...held,
                free: () => {
                  freed.add(tensor);
                  held.free();
                },
              },
              now,
            );
            kept.push(tensor);
            break;
          }
          case 'send': {
            const tensor = kept[operation.pick % kept.length];
            if (!tensor || tensor.gone) break;
            store.beginSend(tensor);
            sends.push(tensor);
            break;
          }
          case 'fetched':
          case 'failed': {
            const [tensor] = sends.splice(operation.pick % sends.length, 1);
            if (tensor) store.endSend(tensor, operation.op === 'fetched');
            break;
          }
          case 'finish':
            store.finish(operation.id);
            break;
          case 'evict':
            store.evict();
            break;
          case 'orphans':
            store.freeOrphans(now - operation.age);
            break;
          default:
            break;
        }
        for (const tensor of sends) expect(freed.has(tensor)).toBe(false);
        const held = kept.filter((tensor) => !freed.has(tensor));
        expect([store.size, money.out]).toEqual([held.length, bytesOf(held)]);
        expect(store.checkIntegrity()).toEqual([]);
      }
      for (const tensor of sends.splice(0)) store.endSend(tensor, true);
      while (store.evict());
      expect([store.size, money.out]).toEqual([0, 0]);
    }),
  );
});

it('is asked for by exactly its id, or by one other peer under that id with a random suffix', () => {
  const money = bank();
  const store = new SendStore();
  const keep = (id: string) =>
    store.keep({ tensorId: id as TensorId, shape: [1], dtype: 'uint8' }, money.take(1), 0);
  const [a0, id] = [transferIdOf('a-0'), (text: string) => text as TensorId];
  const first = keep('a-0#l');
  expect(store.lookup(id('a-0#l'))).toEqual({ kind: 'found', tensor: first });
  expect(store.lookup(id('a-0#other'))).toEqual({ kind: 'absent' });
  expect(store.lookup(id('a-1#l'))).toEqual({ kind: 'absent' });
  // Of ours: the same text but for what looks like a suffix is another request.
  expect(store.lookup(id('a-0-89abcdef#l'))).toEqual({ kind: 'absent' });
  expect(store.lookup(id('a-0-89abcdef#l'), a0)).toEqual({ kind: 'found', tensor: first });
  expect(store.lookup(id('a-0-01234567#l'), a0)).toEqual({
    kind: 'ambiguous',
    requestIds: ['a-0-89abcdef', 'a-0-01234567'],
  });
  expect(store.nearMisses(id('a-0-01234567#l'))).toEqual(['a-0#l']);
  const whole = keep('a-0-01234567#l');
  expect(store.lookup(id('a-0-01234567#l'), a0)).toEqual({ kind: 'found', tensor: whole });
  store.finish('a-0');
  keep('a-0#l');
  expect(store.lookup(id('a-0-fedcba98#l'), a0).kind).toBe('found');
});
