import { setMaxListeners } from 'node:events';
import { describe, expect, it } from 'vitest';
import { arrivalTimes } from '../../../../bench/serve/lengths.ts';
import { type Clock, runLoad, type Send } from '../../../../bench/serve/load.ts';
import type { PlannedRequest, RequestRecord } from '../../../../bench/serve/record.ts';

/** Time that goes on when everyone waits: to the earliest of what is waited for. */
class VirtualClock implements Clock {
  #now = 1_000;
  readonly #waiting = new Set<{ readonly atMs: number; readonly wake: () => void }>();

  now(): number {
    return this.#now;
  }

  sleepUntil(atMs: number, signal?: AbortSignal): Promise<void> {
    if (signal?.aborted) return Promise.resolve();
    return new Promise((resolve) => {
      const wake = () => {
        this.#waiting.delete(wait);
        signal?.removeEventListener('abort', wake);
        resolve();
      };
      const wait = { atMs, wake };
      this.#waiting.add(wait);
      signal?.addEventListener('abort', wake);
    });
  }

  /** Runs `work` to its end. */
  async run<T>(work: Promise<T>): Promise<T> {
    let over = false;
    const end = work.finally(() => {
      over = true;
    });
    while (!over) {
      await new Promise((resolve) => setImmediate(resolve)); // everyone has come to a wait
      const next = [...this.#waiting].sort((a, b) => a.atMs - b.atMs)[0];
      if (!next) continue;
      this.#now = Math.max(this.#now, next.atMs);
      next.wake();
    }
    return end;
  }
}

const plan = (count: number): PlannedRequest[] =>
  Array.from({ length: count }, (_, index) => ({ index, prompt: 'p', outputTokens: 2 }));

/** Answers after `ms`, or is interrupted. */
function answering(clock: VirtualClock, ms: (index: number) => number): Send & { most: number } {
  let running = 0;
  const send = async (request: PlannedRequest, startMs: number, signal: AbortSignal) => {
    send.most = Math.max(send.most, ++running);
    const sentAt = clock.now();
    await clock.sleepUntil(sentAt + ms(request.index), signal);
    running--;
    return {
      index: request.index,
      outcome: signal.aborted ? 'interrupted' : 'done',
      sentMs: sentAt - startMs,
      endToEndMs: clock.now() - sentAt,
      textMs: 0,
      gapsMs: [],
      outputTokens: 2,
      countedBy: 'usage',
      asked: { outputTokens: 2 },
    } satisfies RequestRecord;
  };
  send.most = 0;
  return send;
}

const never = new AbortController().signal;
setMaxListeners(0, never);

describe('load', () => {
  it('of a concurrency keeps so many under way and sends the next when one ends', async () => {
    const clock = new VirtualClock();
    const send = answering(clock, (index) => (index === 0 ? 50 : 10));
    const load = runLoad({
      ...{ requests: plan(9), arrival: { kind: 'concurrency', width: 2 }, seed: 0, send, clock },
      signal: never,
    });
    const { records, durationMs, mostRunning } = await clock.run(load);
    expect(records.map((record) => record.index).sort()).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8]);
    expect(send.most).toBe(2);
    expect(mostRunning).toBe(2);
    // one lane is busy for 50 ms with the first, the other takes five meanwhile; then three more between them
    expect(durationMs).toBe(70);
  });

  it('of a rate sends when the plan says, whether answers come or not', async () => {
    const clock = new VirtualClock();
    const send = answering(clock, () => 60_000);
    const load = runLoad({
      ...{ requests: plan(20), arrival: { kind: 'rate', perSecond: 10 }, seed: 4, send, clock },
      signal: never,
    });
    const { records, mostRunning, lateMs } = await clock.run(load);
    const sent = records.map((record) => record.sentMs).sort((a, b) => a - b);
    for (const [i, at] of arrivalTimes(10, 20, 4).entries()) expect(sent[i]).toBeCloseTo(at, 6);
    expect(mostRunning).toBe(20);
    expect(Math.max(...lateMs)).toBeCloseTo(0, 6);
  });

  it.each(['rate', 'concurrency'] as const)(
    'of a %s that is stopped sends nothing more and keeps what it has',
    async (kind) => {
      const clock = new VirtualClock();
      const stop = new AbortController();
      const send = answering(clock, () => 100);
      const arrival = kind === 'rate' ? { kind, perSecond: 20 } : { kind, width: 3 };
      const load = runLoad({
        ...{ requests: plan(1_000), arrival, seed: 1, send, clock, signal: stop.signal },
        onChange: ({ ended }) => {
          if (ended === 10) stop.abort();
        },
      });
      const { records } = await clock.run(load);
      expect(records.filter((record) => record.outcome === 'done')).toHaveLength(10);
      const interrupted = records.filter((record) => record.outcome === 'interrupted').length;
      expect(records).toHaveLength(10 + interrupted);
      expect(interrupted).toBeLessThan(10);
    },
  );
});
