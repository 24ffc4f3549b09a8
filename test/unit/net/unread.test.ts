import { once } from 'node:events';
import type { ServerResponse } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import fastify from 'fastify';
import { expect, onTestFinished, test } from 'vitest';
import { limitUnread } from '../../../src/net/unread.ts';

/** More than the system takes of an answer that nobody reads. */
const LONG = Buffer.alloc(32 * 2 ** 20, 'x');

test('the time for an answer to be read is over once it has been, though another follows on the connection', async () => {
  const app = fastify({ forceCloseConnections: true });
  onTestFinished(() => app.close());
  app.addHook('onRequest', async () => {});
  limitUnread(app, 3_600_000);
  const answers: ServerResponse[] = [];
  const both = new Promise<void>((resolve) => {
    app.get('/', (_, reply) => {
      reply.hijack();
      if (answers.push(reply.raw) === 2) resolve();
    });
  });
  await app.listen({ host: '127.0.0.1', port: 0 });

  const client = connect((app.server.address() as AddressInfo).port, '127.0.0.1');
  client.write('GET / HTTP/1.1\r\nhost: x\r\n\r\n'.repeat(2));
  await both;
  const [first, second] = answers as [ServerResponse, ServerResponse];
  const socket = first.socket!;
  first.end(LONG);
  expect(socket.timeout).toBe(3_600_000);
  client.resume();
  await once(first, 'finish');
  expect(socket.timeout).toBe(0);
  second.end('second');
  await once(second, 'finish');
  client.destroy();
});
