import fc from 'fast-check';
import { expect, test } from 'vitest';
import { TextIndex, textKeys } from '../../../src/proxy/text-index.ts';

const keysOf = (text: string, scope = 'm') => textKeys(new TextEncoder().encode(text), scope);

/** As it stands for bytes: some tokens of each chunk. */
const TOKENS = 64;
const CHUNK = 4 * TOKENS;

test('texts have as many keys in common as full chunks from the start, and none where the model is another', () => {
  fc.assert(
    fc.property(fc.nat(20), fc.nat(1_000), fc.string(), fc.string(), (chunks, more, a, b) => {
      const common = 'x'.repeat(chunks * CHUNK);
      const [one, other] = [keysOf(`${common}0${a}${'y'.repeat(more)}`), keysOf(`${common}1${b}`)];
      const same = one.filter((key, at) => other[at] === key);
      expect(same).toEqual(one.slice(0, chunks));
      expect(keysOf(common, 'n').some((key) => one.includes(key))).toBe(false);
    }),
  );
});

test('a text has the keys of its beginning wherever it lies in memory', () => {
  const text = new TextEncoder().encode(`---${'lorem ipsum dolor '.repeat(100)}`);
  for (const from of [1, 2, 3])
    expect(textKeys(text.subarray(from), 'm')).toEqual(textKeys(text.slice(from), 'm'));
});

test('texts that differ in their beginning have no key in common', () => {
  const seen = new Set<number>();
  const texts = 2_000;
  for (let i = 0; i < texts; i++) for (const key of keysOf(`${i}${'z'.repeat(CHUNK * 4)}`)) seen.add(key);
  expect(seen.size).toBe(texts * 4);
});

test('a text of any length has a bounded number of keys, and few of them are for its end', () => {
  const most = keysOf('z'.repeat(32 * 2 ** 20)).length;
  expect(most).toBeLessThan(500);
  const text = 'z'.repeat(2 ** 20);
  const index = new TextIndex();
  index.use('a', keysOf(text), 2 ** 20);
  const grown = index.leading('a', keysOf(`${text}${'y'.repeat(2 ** 18)}`));
  expect(grown).toBeLessThanOrEqual(2 ** 18);
  expect(grown).toBeGreaterThan(2 ** 18 * 0.98);
});

test('no instance is credited with what it was not given, and none has more than its cache holds', () => {
  const step = fc.record({
    address: fc.constantFrom('a', 'b'),
    prompt: fc.tuple(fc.nat(3), fc.integer({ min: 1, max: 12 })),
    forget: fc.boolean(),
  });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 30 }), fc.integer({ min: 1, max: 20 }), (steps, most) => {
      const index = new TextIndex();
      const given = new Map<string, number>();
      const promptOf = (family: number, chunks: number) => keysOf(String(family).repeat(chunks * CHUNK));
      for (const { address, prompt, forget } of steps) {
        const [family, chunks] = prompt;
        if (forget) {
          index.forget(address);
          for (const key of given.keys()) if (key.startsWith(address)) given.delete(key);
          continue;
        }
        const keys = promptOf(family, chunks);
        index.use(address, keys, most * TOKENS);
        const name = `${address}${family}`;
        given.set(name, Math.max(given.get(name) ?? 0, chunks));
        // What was given last is there from its start, as far as there is room.
        expect(index.leading(address, keys)).toBe(Math.min(chunks, most) * TOKENS);
      }
      for (const address of ['a', 'b']) {
        let total = 0;
        for (let family = 0; family < 4; family++) {
          const leading = index.leading(address, promptOf(family, 12));
          total += leading;
          expect(leading).toBeLessThanOrEqual((given.get(`${address}${family}`) ?? 0) * TOKENS);
        }
        expect(total).toBeLessThanOrEqual(most * TOKENS);
      }
    }),
  );
});

test('what is used again and again stays while what is not makes way', () => {
  const index = new TextIndex();
  const hot = keysOf('hot '.repeat(CHUNK));
  for (let i = 0; i < 1_000; i++) {
    index.use('a', hot, 100 * TOKENS);
    index.use('a', keysOf(`${i} ${'cold '.repeat(CHUNK)}`), 100 * TOKENS);
    expect(index.leading('a', hot)).toBe(4 * TOKENS);
  }
  expect(index.leading('a', keysOf(`0 ${'cold '.repeat(CHUNK)}`))).toBe(0);
});

test('all instances together have a bounded number of keys', () => {
  const index = new TextIndex(45);
  const keys = keysOf('z'.repeat(CHUNK * 10));
  const addresses = Array.from({ length: 100 }, (_, i) => `a${i}`);
  for (const address of addresses) index.use(address, keys, 100 * TOKENS);
  const total = addresses.reduce((sum, address) => sum + index.leading(address, keys), 0);
  expect(total).toBe(40 * TOKENS);
});
