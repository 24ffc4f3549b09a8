import fc from 'fast-check';
import { expect, test } from 'vitest';
import { KvFeed } from '../../../src/proxy/kv-feed.ts';
import type { BlockKey, KvEvent } from '../../../src/wire/kv-events.ts';

const key = (n: number) => String(n).padStart(8) as BlockKey;

/** What a worker publishes, and what it has. */
class Worker {
  readonly cached = new Set<BlockKey>();
  sequence = -1;

  publish(event: KvEvent) {
    if (event.type === 'stored') for (const one of event.keys) this.cached.add(one);
    if (event.type === 'removed') for (const one of event.keys) this.cached.delete(one);
    if (event.type === 'cleared') this.cached.clear();
    return { sequence: ++this.sequence, batch: { time: 0, events: [event] } };
  }

  snapshot() {
    return { sequence: this.sequence, blockSize: 16, keys: [...this.cached] };
  }
}

function following() {
  const known = new Set<BlockKey>();
  const feed = new KvFeed({
    replace: (keys) => {
      known.clear();
      for (const one of keys) known.add(one);
    },
    insert: (keys) => {
      for (const one of keys) known.add(one);
    },
    remove: (keys) => {
      for (const one of keys) known.delete(one);
    },
  });
  return { known, feed };
}

const keys = fc.array(fc.nat(20).map(key), { minLength: 1, maxLength: 4 });
const event: fc.Arbitrary<KvEvent> = fc.oneof(
  {
    weight: 4,
    arbitrary: keys.map((some) => ({ type: 'stored' as const, keys: some, tokens: [], blockSize: 16 })),
  },
  { weight: 3, arbitrary: keys.map((some) => ({ type: 'removed' as const, keys: some })) },
  { weight: 1, arbitrary: fc.constant({ type: 'cleared' as const }) },
);
const step = fc.oneof(
  { weight: 6, arbitrary: fc.record({ do: fc.constant('publish' as const), event }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('lose' as const), event }) },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constantFrom('reconnect' as const, 'restart' as const),
      late: fc.constant(0),
    }),
  },
  // How late the answer is, in batches.
  { weight: 1, arbitrary: fc.record({ do: fc.constant('answer' as const), late: fc.nat(4) }) },
);

test('a worker that never answers for its cache cannot make more than so much be kept of what it publishes', () => {
  const { feed, known } = following();
  const worker = new Worker();
  const some = (from: number, count: number) => Array.from({ length: count }, (_, i) => key(from + i));
  const publish = (keys: readonly BlockKey[]) => {
    const { sequence, batch } = worker.publish({ type: 'stored', keys, tokens: [], blockSize: 16 });
    return feed.batch(sequence, batch);
  };
  for (let i = 0; i < 40; i++) publish(some(i * 2_000, 2_000));
  // The first are not kept any more: after a snapshot from before them, they are missing.
  expect(feed.snapshot({ sequence: -1, blockSize: 16, keys: [] })).toBe(true);
  publish(some(0, 70_000)); // more by itself than is kept
  expect(feed.snapshot(worker.snapshot())).toBe(false);
  expect(known).toEqual(worker.cached);
});

test('whatever is lost, late or begun anew: while it follows, what it knows is what the worker has', () => {
  fc.assert(
    fc.property(fc.array(step, { maxLength: 80 }), (steps) => {
      const { known, feed } = following();
      let worker = new Worker();
      let answer: { readonly snapshot: ReturnType<Worker['snapshot']>; late: number } | undefined;
      for (const s of steps) {
        if (s.do === 'publish' || s.do === 'lose') {
          const { sequence, batch } = worker.publish(s.event);
          if (s.do === 'publish') feed.batch(sequence, batch);
          if (answer && answer.late-- === 0) {
            feed.snapshot(answer.snapshot);
            answer = undefined;
          }
        } else if (s.do === 'reconnect') feed.restart();
        else if (s.do === 'restart') {
          worker = new Worker();
          answer = undefined;
          feed.restart();
        } else answer ??= { snapshot: worker.snapshot(), late: s.late };
      }
      // A batch that was lost is noticed with the next.
      const { sequence, batch } = worker.publish({ type: 'removed', keys: [key(99)] });
      feed.batch(sequence, batch);
      if (!feed.following) feed.snapshot(worker.snapshot());
      expect(feed.following).toBe(true);
      expect([...known].sort()).toEqual([...worker.cached].sort());
    }),
    { numRuns: 500 },
  );
});

test('a gap is asked about once; what came since is not lost', () => {
  const { known, feed } = following();
  const worker = new Worker();
  const stored = (n: number): KvEvent => ({ type: 'stored', keys: [key(n)], tokens: [], blockSize: 16 });
  expect(feed.snapshot(worker.snapshot())).toBe(false);
  worker.publish(stored(1)); // lost
  const second = worker.publish(stored(2));
  expect(feed.batch(second.sequence, second.batch)).toBe(true);
  const snapshot = worker.snapshot();
  const third = worker.publish(stored(3));
  expect(feed.batch(third.sequence, third.batch)).toBe(false);
  expect(feed.following).toBe(false);
  expect(feed.snapshot(snapshot)).toBe(false);
  expect([feed.following, [...known].sort()]).toEqual([true, [key(1), key(2), key(3)]]);
});
