/** A program that starts a proxy learns when a request can be served, and why it cannot. */
import { afterEach, expect, test } from 'vitest';
import { proxyConfig } from '../../../src/config/proxy-config.ts';
import { PdProxy } from '../../../src/proxy/proxy.ts';
import { sendPing } from '../../support/fake-upstream.ts';

const open: PdProxy[] = [];
afterEach(async () => {
  for (const proxy of open.splice(0)) await proxy.close(0);
});

async function start() {
  const proxy = await PdProxy.start(proxyConfig({ log: { level: 'silent' } }));
  open.push(proxy);
  const ping = (type: 'P' | 'D', port: number, digest: string) =>
    sendPing(proxy.discoveryAddress, {
      type,
      http_address: `127.0.0.1:${port}`,
      zmq_address: `127.0.0.1:${port + 1}`,
      native: { version: 1, digest, model: 'demo' },
    });
  return { proxy, ping };
}

test('resolves with the ping that completes a pair, and at once from then on', async () => {
  const { proxy, ping } = await start();
  const paired = proxy.untilPaired();
  await ping('P', 8081, 'abc');
  await ping('D', 8083, 'abc');
  await paired;
  await proxy.untilPaired(0);
  expect(proxy.instances.map(({ role }) => role).sort()).toEqual(['consumer', 'producer']);
});

test('at the deadline says what there is', async () => {
  const { proxy, ping } = await start();
  await expect(proxy.untilPaired(1)).rejects.toMatchObject({
    code: 'NO_INSTANCE',
    message: expect.stringContaining('live instances: none'),
  });
  await ping('P', 8081, 'abc');
  await ping('D', 8083, 'another model');
  while (proxy.instances.length < 2) await new Promise((resolve) => setImmediate(resolve));
  await expect(proxy.untilPaired(1)).rejects.toMatchObject({
    code: 'NO_INSTANCE',
    message: expect.stringMatching(/(?=.*producer 127.0.0.1:8081).*consumer 127.0.0.1:8083/),
  });
});

test('ends with the proxy', async () => {
  const { proxy } = await start();
  const paired = proxy.untilPaired();
  void proxy.close(0);
  await expect(paired).rejects.toMatchObject({ code: 'SERVER_DRAINING' });
});
