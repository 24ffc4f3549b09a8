import fc from 'fast-check';
import { afterEach, expect, it, vi } from 'vitest';
import { Deadlines } from '../../../src/transfer/deadlines.ts';

afterEach(() => vi.useRealTimers());

it('runs each deadline once, in order of time, and none that was cancelled', () => {
  const plan = fc.array(fc.record({ ms: fc.nat(500), cancel: fc.boolean() }), { maxLength: 200 });
  fc.assert(
    fc.property(plan, (entries) => {
      vi.useFakeTimers();
      const deadlines = new Deadlines(() => performance.now());
      const ran: { ms: number; at: number }[] = [];
      const start = performance.now();
      const handles = entries.map(({ ms }) =>
        deadlines.after(ms, () => ran.push({ ms, at: performance.now() - start })),
      );
      for (const [i, { cancel }] of entries.entries()) {
        if (cancel) handles[i]!.cancel();
        if (cancel) handles[i]!.cancel();
      }
      const expected = entries.filter(({ cancel }) => !cancel).map(({ ms }) => ms);
      expect(vi.getTimerCount()).toBe(expected.length);
      vi.advanceTimersByTime(600);
      expect(ran.map(({ ms }) => ms)).toEqual(expected.sort((a, b) => a - b));
      for (const { ms, at } of ran) expect(at).toBeGreaterThanOrEqual(ms);
      expect(vi.getTimerCount()).toBe(0);
      vi.useRealTimers();
    }),
    {
      numRuns: 50,
      examples: [
        [
          [
            { ms: 1, cancel: false },
            { ms: 0, cancel: false },
          ],
        ],
      ],
    },
  );
});

it('has no timer when nothing waits, and a deadline may set another', () => {
  vi.useFakeTimers();
  const deadlines = new Deadlines(() => performance.now());
  expect(vi.getTimerCount()).toBe(0);
  const ran: string[] = [];
  deadlines.after(10, () => {
    ran.push('first');
    deadlines.after(10, () => ran.push('second'));
  });
  vi.advanceTimersByTime(15);
  expect(ran).toEqual(['first']);
  vi.advanceTimersByTime(10);
  expect(ran).toEqual(['first', 'second']);
  expect(vi.getTimerCount()).toBe(0);
});
