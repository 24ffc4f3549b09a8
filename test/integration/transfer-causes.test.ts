/** What an engine knows of why KV did not come or go: in the error, and in its state. */
import { expect, test } from 'vitest';
import type { TransferId } from '../../src/wire/ids.ts';
import {
  failure,
  flat,
  leftovers,
  loadRequest,
  pagedCache,
  send,
  sendCache,
  testServices,
  until,
} from '../support/transfer.ts';

const services = testServices();

test('a load whose producer never opened a pair says so at its deadline', async () => {
  const producer = await services.make();
  const consumer = await services.make();
  const request = loadRequest('r', pagedCache(2, false), [0], producer.address, { timeoutMs: 50 });
  const { code, context, message } = await failure(consumer.load(request));
  expect(code).toBe('KV_LOAD_TIMEOUT');
  expect(context).toMatchObject({ pair: 'none', kvKey: 'transfer' });
  expect(context.nearMiss).toBeUndefined();
  expect(message).toMatch(/there is no pair with it$/);
});

test('a load that waited for memory to ask with failed for want of it', async () => {
  const producer = await services.make({ sendType: 'GET' });
  // A tensor of the load fits; beside another, which is held until its request ends, none does.
  const consumer = await services.make({ sendType: 'GET', kvBufferSize: 1_024, memPoolSize: 0 });
  const tensor = flat('other#layer', 1_000);
  await send(producer, tensor).sent;
  await consumer.receive(tensor.tensorId, producer.address);
  const request = loadRequest('r', pagedCache(2, false), [0], producer.address, { timeoutMs: 50 });
  const { cause } = await failure(consumer.load(request));
  expect(cause).toMatchObject({ code: 'KV_BUFFER_FULL' });
});

test('what was refused is remembered on both ends, until it goes well', async () => {
  const producer = await services.make();
  const consumer = await services.make({ kvBufferSize: 1_024, memPoolSize: 0 });
  const peer = consumer.address;
  const held = flat('held#layer', 1_000, peer);
  const receiving = consumer.receive(held.tensorId, producer.address);
  await send(producer, held).sent;
  await receiving;
  const target = pagedCache(1, false);
  const again = (id: string) => {
    const loading = consumer.load(loadRequest(id, target, [0], producer.address));
    const [layer] = sendCache(producer, id, pagedCache(1, true), [0], peer);
    return { loading, sent: layer!.sent };
  };
  const first = again('first');
  expect((await failure(first.loading)).cause).toMatchObject({ code: 'KV_BUFFER_FULL' });
  await failure(first.sent);
  const told = (service: typeof producer) =>
    service.state().failures.map(({ kind, error, recovered }) => ({ kind, code: error.code, recovered }));
  expect(told(producer)).toEqual([{ kind: 'send', code: 'KV_BUFFER_FULL', recovered: false }]);
  expect(told(consumer)).toEqual([
    { kind: 'load', code: 'KV_LOAD_FAILED', recovered: false },
    { kind: 'refused', code: 'KV_BUFFER_FULL', recovered: false },
  ]);
  consumer.finish('held' as TransferId);
  const second = again('second');
  await Promise.all([second.loading, second.sent]);
  expect(told(producer).map(({ recovered }) => recovered)).toEqual([true]);
  expect(told(consumer).map(({ recovered }) => recovered)).toEqual([true, true]);
  consumer.finish('first' as TransferId);
  consumer.finish('second' as TransferId);
  await until('all free', () => leftovers(consumer).length + leftovers(producer).length === 0);
});

test('a peer is sent to by name', async () => {
  const producer = await services.make();
  const consumer = await services.make();
  const tensor = flat('named#layer', 1_000, { host: 'localhost', port: consumer.address.port });
  const receiving = consumer.receive(tensor.tensorId, producer.address);
  await send(producer, tensor).sent;
  expect(await receiving).toMatchObject({ shape: [1_000] });
});
