import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { PdError } from '../../../src/errors.ts';
import { retryHeaders } from '../../../src/openai-error.ts';
import { Admission, type AdmissionLimits } from '../../../src/proxy/admission.ts';

const LIMITS: AdmissionLimits = { requests: 2, tokens: 0, queued: 4, waitMs: 3_600_000 };
const never = () => new AbortController().signal;

interface Asked {
  readonly name: string;
  state: 'waiting' | 'begun' | 'turned away' | 'over';
  release: () => void;
  error?: PdError;
}

/** A door, and everyone who has come to it. */
function door(limits: Partial<AdmissionLimits> = {}, now?: () => number) {
  const reasons: string[] = [];
  const admission = new Admission({ ...LIMITS, ...limits }, (reason) => reasons.push(reason), now);
  const all: Asked[] = [];
  const ask = (name: string, { key = 'a', priority = 0, tokens = 10, signal = never() } = {}): Asked => {
    const asked: Asked = { name, state: 'waiting', release: () => {} };
    all.push(asked);
    admission.enter({ key, priority, tokens, signal }).then(
      (release) => {
        asked.state = 'begun';
        asked.release = () => {
          asked.state = 'over';
          release();
        };
      },
      (error: unknown) => {
        asked.state = 'turned away';
        asked.error = PdError.from(error);
      },
    );
    return asked;
  };
  const begun = () => all.filter(({ state }) => state === 'begun').map(({ name }) => name);
  return { admission, all, ask, begun, reasons };
}
const settle = () => new Promise((resolve) => setImmediate(resolve));

test('without limits everybody begins at once', async () => {
  const { all, ask } = door({ requests: 0 });
  for (let i = 0; i < 1_000; i++) ask(`${i}`);
  await settle();
  expect(all.every(({ state }) => state === 'begun')).toBe(true);
});

test('what is over the limit waits, a full queue turns away at once, and says when to come again', async () => {
  const { all, ask, begun, reasons } = door();
  for (let i = 0; i < 8; i++) ask(`${i}`);
  await settle();
  expect(all.map(({ state }) => state)).toEqual([
    ...['begun', 'begun', 'waiting', 'waiting', 'waiting', 'waiting', 'turned away', 'turned away'],
  ]);
  const { error } = all[7]!;
  expect([error!.code, error!.status, error!.message]).toEqual([
    'OVERLOADED',
    429,
    'the limit is 2 requests at a time, and the queue is full',
  ]);
  expect(retryHeaders(error!)).toEqual({ 'retry-after': '1' });
  expect(reasons).toEqual(['full', 'full']);
  all[0]!.release();
  await settle();
  expect(begun()).toEqual(['1', '2']);
});

test('when to come again is told by how long requests take, not by how long nobody came', async () => {
  let now = 0;
  const { all, ask } = door({ requests: 2, queued: 4 }, () => now);
  const turnedAway = async () => {
    for (const one of ['running', 'running', 'queued', 'queued', 'queued', 'queued']) ask(one);
    const away = ask('away');
    await settle();
    return retryHeaders(away.error!)['retry-after'];
  };
  const end = async () => {
    for (;;) {
      const running = all.filter(({ state }) => state === 'begun');
      if (running.length === 0) return;
      now += 4_000;
      for (const { release } of running) release();
      await settle();
    }
  };
  await turnedAway();
  await end();
  // Five turns of 4 s, by two at a time.
  expect(await turnedAway()).toBe('10');
  await end();
  now += 8 * 3_600_000;
  expect(await turnedAway()).toBe('10');
});

test('prompt tokens are a limit, too; a prompt longer than it comes through alone', async () => {
  const { all, ask, begun } = door({ requests: 0, tokens: 100 });
  ask('long', { tokens: 500 });
  ask('first', { tokens: 60 });
  ask('second', { tokens: 60 });
  ask('small', { tokens: 1 });
  await settle();
  expect(begun()).toEqual(['long']);
  all[0]!.release();
  await settle();
  // The small one would fit, but the second was before it.
  expect(begun()).toEqual(['first']);
});

describe('in the queue', () => {
  test('lower priorities come first', async () => {
    const { all, ask, begun } = door({ requests: 1 });
    ask('running');
    for (const priority of [5, 0, -1]) ask(`${priority}`, { priority });
    await settle();
    all[0]!.release();
    await settle();
    expect(begun()).toEqual(['-1']);
  });

  test('one with more claim takes the place of the last of whoever has most', async () => {
    const { all, ask, reasons } = door({ requests: 1 });
    ask('running', { key: 'flood' });
    for (let i = 0; i < 4; i++) ask(`flood ${i}`, { key: 'flood' });
    const other = ask('other', { key: 'other' });
    const urgent = ask('urgent', { key: 'flood', priority: -1 });
    await settle();
    expect([other.state, urgent.state]).toEqual(['waiting', 'waiting']);
    const away = all.filter(({ state }) => state === 'turned away').map(({ name }) => name);
    expect(away).toEqual(['flood 2', 'flood 3']);
    expect(reasons).toEqual(['displaced', 'displaced']);
  });

  test('keys get alike, in tokens, however much one of them asks for', async () => {
    const { all, ask } = door({ requests: 1, queued: 1_000 });
    ask('first');
    for (let i = 0; i < 100; i++) ask(`flood ${i}`, { key: 'flood', tokens: 100 });
    for (let i = 0; i < 20; i++) ask(`other ${i}`, { key: 'other', tokens: 50 });
    const served: string[] = [];
    for (let i = 0; i < 30; i++) {
      await settle();
      const running = all.find(({ state }) => state === 'begun')!;
      served.push(running.name.split(' ')[0]!);
      running.release();
    }
    const count = (name: string) => served.filter((one) => one === name).length;
    expect(Math.abs(count('other') - 2 * count('flood'))).toBeLessThanOrEqual(3);
  });

  test('one whose client goes leaves it; one that waits too long is turned away', async () => {
    const { ask, admission } = door({ requests: 1, waitMs: 1 });
    const gone = new AbortController();
    ask('running');
    const late = ask('late');
    const left = ask('left', { signal: gone.signal });
    gone.abort(new PdError('REQUEST_ABORTED', 'gone'));
    await settle();
    expect(left.error?.code).toBe('REQUEST_ABORTED');
    while (late.state === 'waiting') await settle();
    expect([late.error?.code, admission.queued]).toEqual(['OVERLOADED', 0]);
  });
});

test('whatever comes and goes: limits hold, no place is lost, and everybody hears once', async () => {
  const step = fc.oneof(
    {
      weight: 3,
      arbitrary: fc.record({
        key: fc.constantFrom('a', 'b', 'c'),
        priority: fc.integer({ min: -1, max: 1 }),
        tokens: fc.nat(60),
      }),
    },
    { weight: 2, arbitrary: fc.record({ release: fc.nat(10) }) },
    { weight: 1, arbitrary: fc.record({ abort: fc.nat(20) }) },
  );
  const limits = fc.record({ requests: fc.nat(3), tokens: fc.nat(100), queued: fc.nat(5) });
  await fc.assert(
    fc.asyncProperty(limits, fc.array(step, { maxLength: 60 }), async (some, steps) => {
      const { admission, all, ask } = door(some);
      const clients: AbortController[] = [];
      const tokensOf = new Map<Asked, number>();
      for (const s of steps) {
        if ('key' in s) {
          const client = new AbortController();
          clients.push(client);
          tokensOf.set(ask('', { ...s, signal: client.signal }), s.tokens);
        } else if ('release' in s) all.filter(({ state }) => state === 'begun')[s.release]?.release();
        else clients[s.abort]?.abort(new PdError('REQUEST_ABORTED', 'gone'));
        await settle();
        const running = all.filter(({ state }) => state === 'begun');
        expect(admission.underWay).toBe(running.length);
        expect(admission.queued).toBe(all.filter(({ state }) => state === 'waiting').length);
        expect(admission.queued).toBeLessThanOrEqual(some.queued);
        if (some.requests > 0) expect(running.length).toBeLessThanOrEqual(some.requests);
        const tokens = running.reduce((sum, one) => sum + tokensOf.get(one)!, 0);
        if (some.tokens > 0 && running.length > 1) expect(tokens).toBeLessThanOrEqual(some.tokens);
      }
      while (all.some(({ state }) => state === 'begun')) {
        for (const one of all) if (one.state === 'begun') one.release();
        await settle();
      }
      expect(all.filter(({ state }) => state === 'waiting')).toEqual([]);
      expect([admission.underWay, admission.queued]).toEqual([0, 0]);
    }),
  );
});
