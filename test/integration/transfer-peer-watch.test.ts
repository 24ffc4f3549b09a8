/** A load whose producer is dead, and which nobody tells. */
import { createServer } from 'node:net';
import { expect, test } from 'vitest';
import { failure, keptPort, leftovers, loadRequest, pagedCache, testServices } from '../support/transfer.ts';

const services = testServices();

/** The watch looks soon; the deadlines that would end the load otherwise are far. */
const timeouts = { connect: 50, load: 600_000 };

test('a producer that died before it had a pair with us fails the load long before its deadline', async () => {
  const producer = await services.make({ port: await keptPort() });
  const consumer = await services.make({ timeouts });
  const load = failure(consumer.load(loadRequest('r', pagedCache(2, false), [0], producer.address)));
  await producer.dispose();
  const { code, message } = await load;
  expect(code).toBe('KV_LOAD_FAILED');
  expect(message).toMatch(/PEER_UNREACHABLE: 127\.0\.0\.1:\d+, whose KV r waits for, refuses connections/);
  expect(leftovers(consumer)).toEqual([]);
});

test('a producer that is there and slow keeps its load', async () => {
  const consumer = await services.make({ timeouts });
  let looks = 0;
  let lookedTwice = () => {};
  const twice = new Promise<void>((resolve) => {
    lookedTwice = resolve;
  });
  const slow = createServer((socket) => {
    socket.destroy();
    if (++looks === 2) lookedTwice();
  });
  await new Promise<void>((resolve) => void slow.listen(0, '127.0.0.1', resolve));
  const { port } = slow.address() as { port: number };
  const peer = { host: '127.0.0.1', port };
  const load = failure(consumer.load(loadRequest('r', pagedCache(2, false), [0], peer)));
  await twice;
  expect(consumer.state().waiting.map(({ requestId }) => requestId)).toEqual(['r']);
  consumer.cancelLoad('r');
  expect((await load).code).toBe('REQUEST_ABORTED');
  slow.close();
});

test('an address that cannot be one fails the load, not the engine', async () => {
  const consumer = await services.make({ timeouts });
  const peer = { host: '127.0.0.1', port: 70_000 };
  const { code } = await failure(consumer.load(loadRequest('r', pagedCache(2, false), [0], peer)));
  expect(code).toBe('KV_LOAD_FAILED');
  expect(leftovers(consumer)).toEqual([]);
});
