/** A bound on a wait: it comes, whoever holds what. */
import { once } from 'node:events';
import { setImmediate as turn } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { expect, test } from 'vitest';
import { within } from '../../src/deferred.ts';

/** As those do who ask something of a peer: nothing holds the signal but its listener. */
function ended(ms: number, stop: AbortSignal): Promise<unknown> {
  const signal = within(ms, stop);
  return new Promise((resolve) => {
    signal.addEventListener('abort', () => resolve(signal.reason), { once: true });
  });
}

test('a bound that nobody holds comes all the same, after what is not held has been collected', async () => {
  setFlagsFromString('--expose-gc');
  const collect = runInNewContext('gc') as () => void;
  const end = ended(20, new AbortController().signal);
  for (let i = 0; i < 3; i++) {
    await turn();
    collect();
  }
  expect(await end).toMatchObject({ name: 'TimeoutError' });
});

test('a bound comes early, with the reason, where there is one to stop', async () => {
  const stop = new AbortController();
  const later = within(3_600_000, stop.signal);
  const heard = once(later, 'abort');
  stop.abort('stop');
  await heard;
  expect(later.reason).toBe('stop');
  expect(within(3_600_000, stop.signal).reason).toBe('stop');
});
