import { createServer } from 'node:net';
import { afterEach, expect, it } from 'vitest';
import { assertBindable, assertReachable, listeningInodes } from '../../../src/net/port-holder.ts';

const closers: (() => void)[] = [];
afterEach(() => {
  for (const close of closers.splice(0)) close();
});

function listenOn(host: string): Promise<number> {
  const server = createServer();
  closers.push(() => server.close());
  return new Promise((resolve, reject) => {
    server.once('error', reject).listen(0, host, () => {
      const address = server.address();
      resolve(typeof address === 'object' && address ? address.port : 0);
    });
  });
}

it('reads the listening sockets of a port from the table of the kernel', () => {
  const table = [
    '  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode',
    '   0: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0',
    '   1: 0100007F:1F91 0100007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0',
    '   2: 00000000:1F92 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0',
    '',
  ].join('\n');
  expect(listeningInodes(table, 8081)).toEqual(['4711']);
});

it('names the port that is taken, and who holds it', async () => {
  const port = await listenOn('127.0.0.1');
  await expect(assertBindable({ host: '127.0.0.1', port }, 'HTTP server')).rejects.toMatchObject({
    code: 'PORT_IN_USE',
    message: expect.stringMatching(
      process.platform === 'linux'
        ? new RegExp(`port ${port} on 127.0.0.1 is held by .*\\(pid ${process.pid}\\)`)
        : `${port}`,
    ),
  });
  // It is not held on all addresses, only tried there.
  await expect(assertBindable({ host: '0.0.0.0', port }, 'HTTP server')).rejects.toMatchObject({
    message: expect.stringContaining(`port ${port} is held by`),
  });
  await assertBindable({ host: '127.0.0.1', port: 0 }, 'HTTP server');
});

it('says of an address that is not of this machine', async () => {
  await expect(assertBindable({ host: '192.0.2.1', port: 0 }, 'HTTP server')).rejects.toMatchObject({
    code: 'ADDRESS_INVALID',
    message: expect.stringContaining('192.0.2.1'),
  });
});

it('finds out beforehand that a host is of no use', async () => {
  await assertReachable('127.0.0.1', '--host');
  await assertReachable('0.0.0.0', '--host');
  for (const host of ['192.0.2.1', 'does-not-exist.invalid']) {
    await expect(assertReachable(host, '--host')).rejects.toMatchObject({
      code: 'ADDRESS_INVALID',
      message: expect.stringMatching(`^--host: ${host}`),
    });
  }
});
