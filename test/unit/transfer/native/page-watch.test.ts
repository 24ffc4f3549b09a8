/** How a consumer looks for what is written: often enough, and not for ever. */
import { afterEach, beforeEach, expect, it, vi } from 'vitest';
import type { Nonce } from '../../../../src/transfer/native/messages.ts';
import { digestForPage, PageWatch } from '../../../../src/transfer/native/page-watch.ts';
import type { OwnerPage, SlotState } from '../../../../src/transport/direct/page.ts';

const NONCE = 'p'.repeat(32) as Nonce;
const SLOT = { peer: 'producer', nonce: NONCE, slot: 3, seq: 7 };

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

function start() {
  const now = { state: 'none' as SlotState, flagged: false };
  const granted: number[][] = [];
  let looks = 0;
  const page = {
    grant: (slot: number, seq: number) => granted.push([slot, seq]),
    revoke: (slot: number) => granted.push([slot, 0]),
    flag: () => (now.flagged ? { mark: 1, began: 0n, ended: 0n } : undefined),
    state: () => {
      looks++;
      return now.state;
    },
    result: () => ({ state: now.state, token: 5, digest: digestForPage('ab'.repeat(16))!, time: 0 }),
  } as unknown as OwnerPage;
  const told: unknown[] = [];
  const watch = new PageWatch(() => page, {
    flag: ({ seq }) => told.push(['flag', seq]),
    done: ({ seq }, draw) => told.push(['done', seq, draw]),
  });
  return { now, granted, told, watch, looks: () => looks };
}

/** Passes `ms` of time, however often the event loop turns meanwhile, and tells how often was looked. */
async function looksIn(looks: () => number, ms: number): Promise<number> {
  const before = looks();
  await vi.advanceTimersByTimeAsync(ms);
  return looks() - before;
}

it('each millisecond until the last chunk begins, and tells the flag before the end', async () => {
  const { now, told, watch, granted, looks } = start();
  watch.grant(SLOT);
  expect(granted).toEqual([[3, 7]]);
  // past the moment in which it looks without a pause
  await vi.advanceTimersByTimeAsync(5);
  expect(await looksIn(looks, 100)).toBeLessThanOrEqual(101);
  now.flagged = true;
  await looksIn(looks, 2);
  expect(told).toEqual([['flag', 7]]);
  now.state = 'done';
  await looksIn(looks, 1);
  expect(told).toContainEqual(['done', 7, { drawn: [5], samplingDigest: 'ab'.repeat(16) }]);
  watch.revoke(NONCE, 3);
  expect(granted.at(-1)).toEqual([3, 0]);
  expect(await looksIn(looks, 100)).toBe(0);
});

it('without a pause once the last chunk has begun, but for a producer that stands still only so long', async () => {
  const { now, watch, looks } = start();
  now.state = 'last';
  const real = performance.now;
  let time = 0;
  vi.spyOn(performance, 'now').mockImplementation(() => time);
  try {
    watch.grant(SLOT);
    // fake timers turn the loop without passing time
    for (let i = 0; i < 10; i++) await vi.advanceTimersToNextTimerAsync();
    const spun = looks();
    expect(spun).toBeGreaterThan(10);
    time = 251;
    expect(await looksIn(looks, 100)).toBeLessThanOrEqual(102);
  } finally {
    performance.now = real;
    watch.close();
  }
});
