/** KV that nobody has come for in time; one id for two prompts, where KV of the first is on its way when that of the second is announced. */
import pino from 'pino';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { type Deferred, deferred } from '../../../src/deferred.ts';
import { HostDevice } from '../../../src/device/host.ts';
import { PdError } from '../../../src/errors.ts';
import { RateLimitedLog } from '../../../src/observability/log.ts';
import { MetricsPage } from '../../../src/observability/metrics.ts';
import type { TransferContext } from '../../../src/transfer/context.ts';
import { Deadlines } from '../../../src/transfer/deadlines.ts';
import type { Claimant } from '../../../src/transfer/frozen/claims.ts';
import { Intake } from '../../../src/transfer/frozen/intake.ts';
import type { StoreEntry } from '../../../src/transfer/frozen/store.ts';
import { KvMemory } from '../../../src/transfer/kv-memory.ts';
import type { Pair } from '../../../src/transport/transport.ts';
import { type TransferId, tensorIdOf } from '../../../src/wire/ids.ts';
import { count, transferOptions } from '../../support/transfer.ts';

const ID = 'cmpl-a-0' as TransferId;
type Prompt = 'rome' | 'paris';

/** Takes one layer of a prompt, as a load does. */
class Waiter implements Claimant {
  readonly transferId = ID;
  readonly peer = 'p:1';
  readonly promptDigest: Prompt;
  got: StoreEntry | undefined;
  failure: unknown;

  constructor(promptDigest: Prompt) {
    this.promptDigest = promptDigest;
  }

  wants(): boolean {
    return !this.got && this.failure === undefined;
  }

  take(entry: StoreEntry): void {
    this.got = entry;
  }

  fail(reason: unknown): void {
    this.failure = reason;
  }
}

function world() {
  const log = pino({ level: 'silent' });
  const [metrics, deadlines] = [new MetricsPage(), new Deadlines()];
  const parts = { device: new HostDevice(), metrics, deadlines, log };
  const memory = new KvMemory({ ...parts, bufferBytes: 2 ** 20, poolLimitBytes: 0 });
  const options = transferOptions();
  const context = { ...parts, memory, options, limited: new RateLimitedLog() } as unknown as TransferContext;
  const intake = new Intake(context);
  const arrivals: Deferred<void>[] = [];
  const pair = {
    receive: () => {
      const arrival = deferred<void>();
      arrivals.push(arrival);
      return arrival.promise;
    },
  } as unknown as Pair;
  return {
    intake,
    memory,
    orphanMs: options.timeouts.orphan,
    duplicates: () => count({ metrics }, 'pd_protocol_errors_total', 'duplicate'),
    /** Announced, answered and on its way; resolves what makes it arrive. Undefined where it was refused. */
    announce: async (promptDigest: Prompt): Promise<(() => Promise<void>) | undefined> => {
      const put = { cmd: 'PUT', tensor_id: tensorIdOf(ID, 'l'), shape: [8], dtype: 'uint8' } as const;
      const entry = await intake.admit({ ...put, native: { promptDigest } }, 'p:1', {});
      if (!entry) return undefined;
      const arrived = intake.post(entry, pair);
      const arrival = arrivals.at(-1)!;
      return () => {
        arrival.resolve();
        return arrived;
      };
    },
    end: () => {
      deadlines.clear();
      expect(intake.store.checkIntegrity()).toEqual([]);
    },
  };
}

afterEach(() => {
  vi.useRealTimers();
});

describe('KV that was freed as nobody had come for it', () => {
  it.each([2, 9])(
    'is not waited for by who comes after %i times that time, unless it is sent anew',
    async (times) => {
      vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'performance'] });
      const { intake, memory, announce, orphanMs, end } = world();
      await (await announce('rome'))?.();
      vi.advanceTimersByTime(times * orphanMs);
      expect(memory.bufferUsed).toBe(0);
      const [late, other] = [new Waiter('rome'), new Waiter('paris')];
      for (const waiter of [late, other]) {
        intake.claim(waiter);
        intake.claims.unregister(waiter);
      }
      expect(late.failure).toMatchObject({ code: 'KV_LOAD_FAILED', context: { peer: 'p:1' } });
      expect(other.failure).toBeUndefined();
      const comes = await announce('rome');
      const again = new Waiter('rome');
      intake.claim(again);
      await comes?.();
      expect([again.failure, again.got?.promptDigest]).toEqual([undefined, 'rome']);
      intake.store.release(again.got!);
      end();
    },
  );
});

it('is known to be lost long after its sender has said so', () => {
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'performance'] });
  const { intake, orphanMs, end } = world();
  const reason = new PdError('KV_SEND_FAILED', 'no answer');
  intake.lost(ID, reason);
  vi.advanceTimersByTime(9 * orphanMs);
  const late = new Waiter('rome');
  intake.claim(late);
  expect(late.failure).toBe(reason);
  end();
});

describe('an id that is used again while KV of its first prompt is on its way', () => {
  it('brings the second its own KV, whoever comes first, and frees what nobody came for', async () => {
    for (const wanted of ['before', 'after'] as const) {
      const { intake, memory, announce, duplicates, end } = world();
      const waiter = new Waiter('paris');
      const romeComes = await announce('rome');
      if (wanted === 'before') intake.claim(waiter);
      const parisComes = await announce('paris');
      expect(duplicates()).toBe(0);
      await romeComes?.();
      await parisComes?.();
      if (wanted === 'after') intake.claim(waiter);
      expect(waiter.got?.promptDigest).toBe('paris');
      expect(memory.bufferUsed).toBe(8);
      intake.store.release(waiter.got!);
      intake.claims.unregister(waiter);
      intake.finish(ID);
      expect([memory.bufferUsed, intake.store.size]).toEqual([0, 0]);
      end();
    }
  });

  it('leaves the first its KV where somebody waits for it, and keeps that of the second past its end', async () => {
    const { intake, memory, announce, end } = world();
    const first = new Waiter('rome');
    intake.claim(first);
    const romeComes = await announce('rome');
    const parisComes = await announce('paris');
    await romeComes?.();
    expect(first.got?.promptDigest).toBe('rome');
    // The second comes before the first is over, and is not taken for what came instead of it.
    await parisComes?.();
    intake.complete(ID);
    intake.store.release(first.got!);
    intake.claims.unregister(first);
    intake.finish(ID);
    const second = new Waiter('paris');
    intake.claim(second);
    expect(second.got?.promptDigest).toBe('paris');
    expect([first.failure, second.failure, memory.bufferUsed]).toEqual([undefined, undefined, 8]);
    intake.store.release(second.got!);
    end();
  });

  it('of the same prompt is refused, since who wants it gets the first', async () => {
    const { intake, announce, duplicates, end } = world();
    const comes = await announce('rome');
    expect(await announce('rome')).toBeUndefined();
    expect(duplicates()).toBe(1);
    const waiter = new Waiter('rome');
    intake.claim(waiter);
    await comes?.();
    expect(waiter.got?.promptDigest).toBe('rome');
    intake.store.release(waiter.got!);
    end();
  });
});
