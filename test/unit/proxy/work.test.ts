import fc from 'fast-check';
import { expect, test } from 'vitest';
import { choose } from '../../../src/proxy/placement.ts';
import { InstanceWork } from '../../../src/proxy/work.ts';
import type { WorkerLoad } from '../../../src/wire/messages.ts';

const load = (more: Partial<WorkerLoad> = {}): WorkerLoad => ({
  running: 0,
  waiting: 0,
  kvUsed: 0,
  kvBlocks: 100,
  queuedTokens: 0,
  ...more,
});

test('without a word from the instance, what this proxy has given it is all there is', () => {
  const work = new InstanceWork(() => 0);
  const end = work.begin(500);
  work.begin(20);
  expect([work.requests, work.queuedTokens, work.kvUse]).toEqual([2, 520, 0]);
  end();
  end();
  expect([work.requests, work.queuedTokens, work.own]).toEqual([1, 20, 1]);
});

test('what was given before a ping left is in it, what was on its way is not', () => {
  const clock = { now: 0 };
  const work = new InstanceWork(() => clock.now);
  const early = work.begin(1_000);
  clock.now = 1_000;
  const late = work.begin(300);
  clock.now += 10;
  work.tell(load({ running: 1, waiting: 4, queuedTokens: 700, kvUsed: 25 }));
  expect([work.requests, work.queuedTokens, work.kvUse]).toEqual([6, 1_000, 0.25]);
  early();
  expect(work.queuedTokens).toBe(1_000);
  late();
  expect([work.requests, work.queuedTokens]).toEqual([5, 700]);
});

test('an instance that tells too little is known to have what it was given', () => {
  const clock = { now: 0 };
  const work = new InstanceWork(() => clock.now);
  for (let i = 0; i < 8; i++) work.begin(1);
  clock.now = 10_000;
  work.tell(load());
  expect(work.requests).toBe(8);
});

test('an instance that says it has nothing to do gets at most about twice as much as others', () => {
  const clock = { now: 0 };
  const all = ['liar', 'honest', 'other'].map((address) => ({
    address,
    work: new InstanceWork(() => clock.now),
    ours: true,
    picked: 0,
  }));
  const given = new Map(all.map(({ address }) => [address, 0]));
  const tokens = 4_000;
  for (let turn = 1; turn <= 60; turn++) {
    const chosen = choose('least-loaded', 'producer', all, { tokens, cached: () => 0 });
    chosen.picked = turn;
    chosen.work.begin(tokens);
    given.set(chosen.address, given.get(chosen.address)! + 1);
    clock.now += 1_000;
    for (const { address, work } of all) {
      const waiting = address === 'liar' ? 0 : given.get(address)!;
      work.tell(load({ waiting, queuedTokens: waiting * tokens }));
    }
  }
  expect(given.get('liar')).toBeLessThanOrEqual(2 * given.get('honest')! + 1);
});

test('whatever begins, ends and is told, nothing is counted that is over, and nothing falls below zero', () => {
  const step = fc.oneof(
    fc.record({ begin: fc.nat(1_000) }),
    fc.record({ end: fc.nat(10) }),
    fc.record({ pause: fc.nat(100) }),
    fc.record({ tell: fc.nat(50) }),
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
      const clock = { now: 0 };
      const work = new InstanceWork(() => clock.now);
      const open: { readonly end: () => void; readonly tokens: number }[] = [];
      let told = 0;
      for (const s of steps) {
        if ('begin' in s) open.push({ end: work.begin(s.begin), tokens: s.begin });
        else if ('end' in s) open.splice(s.end, 1)[0]?.end();
        else if ('pause' in s) clock.now += s.pause;
        else {
          told = s.tell;
          work.tell(load({ queuedTokens: told }));
        }
        const given = open.reduce((sum, { tokens }) => sum + tokens, 0);
        expect(work.own).toBe(open.length);
        expect(work.requests).toBeGreaterThanOrEqual(open.length);
        expect(work.queuedTokens).toBeGreaterThanOrEqual(told);
        expect(work.queuedTokens).toBeLessThanOrEqual(told + given);
      }
    }),
  );
});
