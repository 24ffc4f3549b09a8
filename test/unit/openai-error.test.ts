import { once } from 'node:events';
import { createServer } from 'node:https';
import { type AddressInfo, connect } from 'node:net';
import { expect, onTestFinished, test } from 'vitest';
import { refuseUnparsed } from '../../src/openai-error.ts';

test('a connection that never begins with TLS is not kept for ever', async () => {
  const server = createServer({ handshakeTimeout: 20 });
  onTestFinished(() => void server.close());
  server.on('clientError', refuseUnparsed);
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const silent = connect((server.address() as AddressInfo).port, '127.0.0.1').resume();
  onTestFinished(() => void silent.destroy());
  const [broken] = (await once(silent, 'close')) as [boolean];
  expect(broken).toBe(false);
});
