/** Loads that begin while the producer still computes the prompt. */
import { describe, expect, it, vi } from 'vitest';
import type { TransferId } from '../../src/wire/ids.ts';
import { SEND_TYPES } from '../../src/wire/messages.ts';
import {
  failure,
  keptPort,
  leftovers,
  loadRequest,
  pagedCache,
  sendCache,
  testServices,
  until,
} from '../support/transfer.ts';

const services = testServices();

describe.each(SEND_TYPES)('%s', (sendType) => {
  it('a load outlives its deadline by the time that prefill may take', async () => {
    const producer = await services.make({ sendType });
    const consumer = await services.make({ sendType, timeouts: { load: 30 } });
    const target = pagedCache(3, false);
    // The first shows that its deadline has passed for the second too.
    const told = failure(consumer.load(loadRequest('cmpl-a-0', target, [1], producer.address)));
    // Each look at the clock finds it later, as where the process is held up between two.
    const now = performance.now.bind(performance);
    let later = 0;
    const clock = vi.spyOn(performance, 'now').mockImplementation(() => now() + ++later);
    const early = consumer.load(
      loadRequest('cmpl-b-0', target, [2, 3], producer.address, { prefillWithinMs: 60_000 }),
    );
    clock.mockRestore();
    expect((await told).code).toBe('KV_LOAD_TIMEOUT');
    expect(consumer.state().waiting).toMatchObject([
      { requestId: 'cmpl-b-0', deadlineMs: 60_030, prefilling: true },
    ]);
    sendCache(producer, 'cmpl-b-0', pagedCache(3, true), [4, 5], consumer.address);
    expect((await early).bytes).toBeGreaterThan(0);
    for (const id of ['cmpl-a-0', 'cmpl-b-0'] as TransferId[]) {
      for (const one of [consumer, producer]) one.finish(id);
    }
    await until('all free', () => leftovers(consumer).length + leftovers(producer).length === 0);
  });

  it('and no longer once prefill is known to be over', async () => {
    const producer = await services.make({ sendType });
    const consumer = await services.make({ sendType, timeouts: { load: 30 } });
    const target = pagedCache(1, false);
    const early = failure(
      consumer.load(
        loadRequest('cmpl-c-0-0123abcd', target, [2], producer.address, { prefillWithinMs: 600_000 }),
      ),
    );
    consumer.prefilled('cmpl-other-0' as TransferId);
    consumer.prefilled('cmpl-c-0' as TransferId);
    const { code, message } = await early;
    expect(code).toBe('KV_LOAD_TIMEOUT');
    expect(message).toContain('within 30 ms');
  });
});

describe('GET: of what is asked for early', () => {
  it('what is there first comes first', async () => {
    const producer = await services.make({ sendType: 'GET' });
    const consumer = await services.make({ sendType: 'GET' });
    const target = pagedCache(2, false);
    const [slow, quick] = ['cmpl-h-0', 'cmpl-i-0'].map((id, at) =>
      consumer.load(loadRequest(id, target, [at], producer.address, { prefillWithinMs: 60_000 })),
    ) as [Promise<unknown>, Promise<unknown>];
    const failed = failure(slow);
    sendCache(producer, 'cmpl-i-0', pagedCache(2, true), [5], consumer.address);
    await quick;
    consumer.cancelLoad('cmpl-h-0');
    expect((await failed).code).toBe('REQUEST_ABORTED');
  });

  it('what cannot be kept is told to who asks', async () => {
    const producer = await services.make({ sendType: 'GET', kvBufferSize: 64, memPoolSize: 0 });
    const consumer = await services.make({ sendType: 'GET' });
    const load = failure(
      consumer.load(
        loadRequest('cmpl-j-0', pagedCache(1, false), [1], producer.address, { prefillWithinMs: 60_000 }),
      ),
    );
    await until('the pair is open', () => producer.state().pairs.some(({ state }) => state === 'open'));
    const [sent] = sendCache(producer, 'cmpl-j-0', pagedCache(1, true), [5], consumer.address);
    expect((await failure(sent!.sent)).code).toBe('KV_BUFFER_FULL');
    expect((await load).message).toContain(
      'does not have cmpl-j-0#model.layers.0.self_attn.attn: it had no room to keep it',
    );
  });
});

it('a pair that was lost before the load began is no reason to give it up', async () => {
  const timeouts = { connect: 20 };
  const consumer = await services.make({ timeouts });
  const first = await services.make({ port: await keptPort() });
  const { address } = first;
  await Promise.all(
    sendCache(first, 'cmpl-e-0', pagedCache(1, true), [1], consumer.address).map(({ sent }) => sent),
  );
  consumer.finish('cmpl-e-0' as TransferId);
  await first.dispose();
  await until('the pair is over', () => consumer.state().pairs.every(({ state }) => state === 'over'));
  const producer = await services.make({ port: address.port });
  const target = pagedCache(1, false);
  const late = failure(consumer.load(loadRequest('cmpl-f-0', target, [2], address)));
  const early = consumer.load(loadRequest('cmpl-g-0', target, [3], address, { prefillWithinMs: 60_000 }));
  expect((await late).code).toBe('KV_LOAD_FAILED');
  sendCache(producer, 'cmpl-g-0', pagedCache(1, true), [3], consumer.address);
  expect((await early).bytes).toBeGreaterThan(0);
});

it('nor is it one after prefill is over, unless the producer has not opened it anew by then', async () => {
  const consumer = await services.make({ timeouts: { connect: 20 } });
  const first = await services.make({ port: await keptPort() });
  const { address } = first;
  await Promise.all(
    sendCache(first, 'cmpl-k-0', pagedCache(1, true), [1], consumer.address).map(({ sent }) => sent),
  );
  consumer.finish('cmpl-k-0' as TransferId);
  await first.dispose();
  await until('the pair is over', () => consumer.state().pairs.every(({ state }) => state === 'over'));
  await services.make({ port: address.port }); // alive, with nothing to send
  const early = consumer.load(
    loadRequest('cmpl-l-0', pagedCache(1, false), [2], address, { prefillWithinMs: 60_000 }),
  );
  consumer.prefilled('cmpl-l-0' as TransferId);
  const { code, message } = await failure(early);
  expect(code).toBe('KV_LOAD_FAILED');
  expect(message).toContain('pair with');
});
