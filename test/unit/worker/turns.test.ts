import fc from 'fast-check';
import { expect, it } from 'vitest';
import { packLogprobs, unpackLogprobs } from '../../../src/scheduler/prompt-logprobs.ts';
import { jsonInTurns } from '../../../src/worker/server/turns.ts';

it('writes JSON as JSON.stringify does', async () => {
  await fc.assert(
    fc.asyncProperty(fc.jsonValue({ maxDepth: 5 }), async (value) => {
      expect(await jsonInTurns(value)).toBe(JSON.stringify(value));
    }),
  );
  const long = Array.from({ length: 10_000 }, (_, i) => (i % 7 === 0 ? null : i / 3));
  const value = { ids: long, none: undefined, texts: long.map(String), empty: {}, nested: [[long], []] };
  expect(await jsonInTurns(value)).toBe(JSON.stringify(value));
});

it('lets the event loop run while it writes what is long', async () => {
  const entries = Array.from({ length: 200_000 }, (_, i) => ({ token: i, top: { a: -1, b: -2 } }));
  let others = 0;
  const other = () => {
    others++;
    timer = setImmediate(other);
  };
  let timer = setImmediate(other);
  await jsonInTurns({ entries });
  clearImmediate(timer);
  expect(others).toBeGreaterThan(1);
});

it('gives back the log-probabilities that were packed', () => {
  const entry = fc.record({ token: fc.nat(), logprob: fc.double({ noNaN: true }) });
  const entries = fc
    .nat({ max: 3 })
    .chain((top) =>
      fc.array(
        fc
          .tuple(entry, fc.array(entry, { minLength: top, maxLength: top }))
          .map(([one, list]) => ({ ...one, top: list })),
      ),
    );
  fc.assert(
    fc.property(entries, (list) => {
      expect([...unpackLogprobs(packLogprobs(list))]).toEqual(list);
    }),
  );
});
