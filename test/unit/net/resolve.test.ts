import { once } from 'node:events';
import { connect, createServer } from 'node:net';
import { afterEach, describe, expect, test } from 'vitest';
import { freePorts } from '../../../src/net/free-ports.ts';
import { knock, reachable } from '../../../src/net/knock.ts';
import { addressesOf, EVERY_ADDRESS, lookupAll, reasonOf } from '../../../src/net/resolve.ts';

const servers: { close(): unknown }[] = [];
afterEach(() => {
  for (const server of servers.splice(0)) server.close();
});

/** The port of a listener at `host`. */
async function portAt(host: string): Promise<number> {
  const server = createServer((socket) => socket.destroy());
  await new Promise<void>((resolve) => server.listen(0, host, resolve));
  servers.push(server);
  return (server.address() as { port: number }).port;
}

const looked = (host: string, options: { all?: boolean; family?: number }) =>
  new Promise<unknown>((resolve, reject) => {
    lookupAll(host, options, (error, address, family) => {
      if (error) reject(error);
      else resolve(options.all ? address : [address, family]);
    });
  });

describe('the addresses of a name', () => {
  const both = [
    { address: '127.0.0.1', family: 4 },
    { address: '::1', family: 6 },
  ];

  test.each(['localhost', 'LOCALHOST', 'localhost.', 'proxy.localhost'])(
    '%s is loopback of both families',
    async (name) => {
      expect(await addressesOf(name)).toEqual(both);
      expect(await addressesOf(name, 6)).toEqual([both[1]]);
      expect(await looked(name, { all: true })).toEqual(both);
      expect(await looked(name, { family: 6 })).toEqual(['::1', 6]);
    },
  );

  test('an address is its own, and a name without one an error with its code', async () => {
    expect(await looked('fd00::1', { all: true })).toEqual([{ address: 'fd00::1', family: 6 }]);
    await expect(looked('no.such.host.invalid', { all: true })).rejects.toMatchObject({
      code: expect.stringMatching(/^(ENOTFOUND|EAI_AGAIN)$/),
    });
    await expect(addressesOf('localhost.invalid')).rejects.toThrow();
  });
});

test('what several addresses said is told in one line', () => {
  const refused = Object.assign(new Error('connect ECONNREFUSED ::1:1'), { code: 'ECONNREFUSED' });
  const other = Object.assign(new Error('no way'), { code: 'EHOSTUNREACH' });
  const failed = new TypeError('fetch failed', { cause: new AggregateError([refused, other]) });
  expect(reasonOf(failed)).toBe('connect ECONNREFUSED ::1:1, EHOSTUNREACH: no way');
});

test('a port is knocked at by name, on every address', async () => {
  const host = 'localhost';
  const open = await portAt('127.0.0.1');
  expect(await knock({ host, port: open }, 60_000)).toBe('answers');
  expect(await reachable({ host, port: open }, 60_000)).toEqual({ host: '127.0.0.1', port: open });
  const [closed] = await freePorts(1, '127.0.0.1');
  expect(await knock({ host: '127.0.0.1', port: closed! }, 60_000)).toBe('refuses');
});

test('a connection to the first address of a name is not lost to a program that is busy just then', async () => {
  const socket = connect({ host: 'localhost', port: await portAt('127.0.0.1'), ...EVERY_ADDRESS });
  socket.once('connectionAttempt', () =>
    process.nextTick(() => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 400)),
  );
  await once(socket, 'connect');
  expect(socket.remoteAddress).toBe('127.0.0.1');
});
