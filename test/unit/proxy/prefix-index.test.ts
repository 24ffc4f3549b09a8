import fc from 'fast-check';
import { expect, test } from 'vitest';
import { PrefixIndex, TEXT_CHUNK, textKeys } from '../../../src/proxy/prefix-index.ts';

test('texts have as many keys in common as full chunks from the start, and none where the model is another', () => {
  fc.assert(
    fc.property(fc.nat(20), fc.nat(1_000), fc.string(), fc.string(), (chunks, more, a, b) => {
      const common = 'x'.repeat(chunks * TEXT_CHUNK);
      const [one, other] = [
        textKeys(`${common}0${a}${'y'.repeat(more)}`, 'm'),
        textKeys(`${common}1${b}`, 'm'),
      ];
      const same = one.filter((key, at) => other[at] === key);
      expect(same).toEqual(one.slice(0, chunks));
      expect(textKeys(common, 'n').some((key) => one.includes(key))).toBe(false);
    }),
  );
});

test('what is about to be cached counts as cached', () => {
  const index = new PrefixIndex();
  const coming = new Map([
    ['b', 1],
    ['c', 1],
  ]);
  expect(index.leading('x', ['a', 'b', 'c', 'd'], coming)).toBe(0);
  index.insert('x', ['a'], 10);
  expect(index.leading('x', ['a', 'b', 'c', 'd'], coming)).toBe(3);
  expect(index.leading('x', ['a', 'b', 'c', 'd'])).toBe(1);
});

test('a text of any length has a bounded number of keys', () => {
  expect(textKeys('z'.repeat(32 * 2 ** 20), '').length).toBe(8_192);
});

test('no instance is credited with what it was not given, and none has more than its cache holds', () => {
  const step = fc.record({
    address: fc.constantFrom('a', 'b'),
    prompt: fc.tuple(fc.nat(3), fc.integer({ min: 1, max: 12 })),
    forget: fc.boolean(),
  });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 30 }), fc.integer({ min: 1, max: 20 }), (steps, most) => {
      const index = new PrefixIndex();
      const given = new Map<string, Set<string>>();
      const keysOf = ([family, length]: readonly [number, number]) =>
        Array.from({ length }, (_, i) => `${family}/${i}`);
      for (const { address, prompt, forget } of steps) {
        if (forget) {
          index.forget(address);
          given.delete(address);
          continue;
        }
        const keys = keysOf(prompt);
        index.use(address, keys, most);
        const known = given.get(address) ?? new Set();
        given.set(address, known);
        for (const key of keys) known.add(key);
        // What was given last is there from its start, as far as there is room.
        expect(index.leading(address, keys)).toBe(Math.min(keys.length, most));
      }
      for (const address of ['a', 'b']) {
        let total = 0;
        for (let family = 0; family < 4; family++) {
          const leading = index.leading(address, keysOf([family, 12]));
          total += leading;
          for (let i = 0; i < leading; i++) expect(given.get(address)?.has(`${family}/${i}`)).toBe(true);
        }
        expect(total).toBeLessThanOrEqual(most);
      }
    }),
  );
});
