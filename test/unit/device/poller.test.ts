import { describe, expect, test, vi } from 'vitest';
import type { DeviceEvent } from '../../../src/device/device.ts';
import { HostDevice } from '../../../src/device/host.ts';
import { EventPoller } from '../../../src/device/poller.ts';
import { PdError } from '../../../src/errors.ts';

function fakeEvent(): DeviceEvent & { fire(): void; fail(error: Error): void; asked: number } {
  let fired = false;
  let failure: Error | undefined;
  return {
    ref: { kind: 'cuda', handle: 1n },
    asked: 0,
    done() {
      this.asked++;
      if (failure) throw failure;
      return fired;
    },
    fire: () => {
      fired = true;
    },
    fail: (error) => {
      failure = error;
    },
    dispose: () => {},
  };
}

const nextTurn = () => new Promise((resolve) => setImmediate(resolve));

describe('event poller', () => {
  test('host events resolve without a poll, and an idle poller schedules nothing', async () => {
    const immediate = vi.spyOn(globalThis, 'setImmediate');
    try {
      const poller = new EventPoller();
      await poller.wait(new HostDevice().createStream().record(), 1, 'copy');
      expect(immediate).not.toHaveBeenCalled();
    } finally {
      immediate.mockRestore();
    }
  });

  test('polls until the event fires, then no more', async () => {
    const poller = new EventPoller();
    const event = fakeEvent();
    const wait = poller.wait(event, 10_000, 'gather');
    expect(poller.pending).toBe(1);
    await nextTurn();
    event.fire();
    await wait;
    expect(poller.pending).toBe(0);
    const asked = event.asked;
    await nextTurn();
    await nextTurn();
    expect(event.asked).toBe(asked);
  });

  test('each wait has its own deadline, and its error says what it waited for', async () => {
    let now = 0;
    const poller = new EventPoller(() => now);
    const late = poller.wait(fakeEvent(), 10, 'gather of request a#0');
    const event = fakeEvent();
    const slow = poller.wait(event, 100, 'b');
    now = 50;
    await expect(late).rejects.toMatchObject({ code: 'TRANSFER_TIMEOUT' });
    await expect(late).rejects.toThrow(/gather of request a#0.*10 ms/);
    event.fire();
    await slow;
  });

  test('an event that fired while the thread was busy past the deadline counts as done', async () => {
    let now = 0;
    const poller = new EventPoller(() => now);
    const event = fakeEvent();
    const wait = poller.wait(event, 10, 'gather');
    now = 1_000;
    event.fire();
    await wait;
  });

  test('a failed event rejects its own wait only', async () => {
    const poller = new EventPoller();
    const [bad, good] = [fakeEvent(), fakeEvent()];
    const failed = poller.wait(bad, 10_000, 'a');
    const fine = poller.wait(good, 10_000, 'b');
    bad.fail(new PdError('CUDA_ERROR', 'an illegal memory access was encountered'));
    good.fire();
    await expect(failed).rejects.toMatchObject({ code: 'CUDA_ERROR' });
    await fine;
  });

  test('a thousand waits settle in any order', async () => {
    const poller = new EventPoller();
    const events = Array.from({ length: 1000 }, fakeEvent);
    const waits = events.map((event, i) => poller.wait(event, 10_000, `${i}`));
    for (const event of events.toReversed()) event.fire();
    await Promise.all(waits);
    expect(poller.pending).toBe(0);
  });

  test('dispose rejects what waits and what comes', async () => {
    const poller = new EventPoller();
    const wait = poller.wait(fakeEvent(), 10_000, 'a');
    poller.dispose();
    poller.dispose();
    await expect(wait).rejects.toMatchObject({ code: 'ENGINE_CLOSED' });
    await expect(poller.wait(fakeEvent(), 1, 'b')).rejects.toMatchObject({ code: 'ENGINE_CLOSED' });
  });
});
