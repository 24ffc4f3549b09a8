import { vi } from 'vitest';

export interface StoppedClock {
  /** Fires what is due within so many milliseconds. */
  passes(ms: number): void;
  /** Lets time pass until the promise has settled; for a deadline that is set at a moment which nobody announces. */
  passesUntil(settled: Promise<unknown>): Promise<void>;
}

/**
 * Runs `test` while `setTimeout` of this process stands still: its deadlines pass when the test says so, and not while a busy machine is
 * slow. Sockets, promises and `setImmediate` go on.
 */
export async function withStoppedClock(test: (clock: StoppedClock) => Promise<void>): Promise<void> {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
  try {
    await test({
      passes: (ms) => void vi.advanceTimersByTime(ms),
      async passesUntil(settled) {
        let over = false;
        const end = () => {
          over = true;
        };
        settled.then(end, end);
        while (!over) {
          vi.advanceTimersByTime(1_000);
          await new Promise((resolve) => setImmediate(resolve));
        }
      },
    });
  } finally {
    vi.useRealTimers();
  }
}
