import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { WorkerLoad } from '../../../src/wire/messages.ts';
import { LoadReport } from '../../../src/worker/load-report.ts';

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

test('the first is told at once, a burst as one afterwards, its last state included, and nothing twice', () => {
  const told: WorkerLoad[] = [];
  let load: WorkerLoad = { running: 0, waiting: 0, kvUsed: 0, kvBlocks: 1_000, queuedTokens: 0 };
  const report = new LoadReport(
    () => load,
    (one) => told.push(one),
    () => Date.now(),
  );
  report.changed();
  expect(told).toHaveLength(1);
  for (let running = 1; running <= 50; running++) {
    load = { ...load, running };
    report.changed();
  }
  vi.advanceTimersByTime(1_000);
  expect(told.map(({ running }) => running)).toEqual([0, 50]);
  load = { ...load, kvUsed: 5 }; // less than a hundredth of the cache
  report.changed();
  vi.advanceTimersByTime(1_000);
  expect(told).toHaveLength(2);
  load = { ...load, kvUsed: 50 };
  report.changed();
  expect(told).toHaveLength(3);
  report.close();
});
