/** Addresses of etcd, and what becomes of tokens; test/wide/etcd.test.ts has the real one. */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterEach, describe, expect, it } from 'vitest';
import { etcdAddress } from '../../../src/config/kinds.ts';
import { parseValue } from '../../../src/config/options.ts';
import { Etcd, parseEtcdAddress } from '../../../src/net/etcd.ts';

describe('an address', () => {
  it.each(['etcd://', 'http://host:2379', 'etcd://host', 'host:2379', 'etcd://u@host:1', 'etcd://:p@host:1'])(
    '%s is none',
    (text) => expect(() => parseEtcdAddress(text)).toThrow(),
  );

  it('may name several hosts, TLS, a prefix, and a user', () => {
    expect(parseEtcdAddress('etcds://a:1,[::1]:2/fleet/one')).toEqual({
      endpoints: [
        { host: 'a', port: 1 },
        { host: '::1', port: 2 },
      ],
      secure: true,
      prefix: 'fleet/one/',
    });
    expect(parseEtcdAddress('etcd://a:1').prefix).toBe('pd-worker/');
    expect(parseEtcdAddress('etcd://fleet:p%40ss%3A%2F@a:1,b:2')).toMatchObject({
      user: { name: 'fleet', password: 'p@ss:/' },
      endpoints: [{ host: 'a' }, { host: 'b' }],
    });
  });

  it.each([
    'etcd://u:s3cret@',
    'etcd://u:s3cret@host',
    'etcd://u:s3/cret@a:1',
    'etcd://u:s3cret%@a:1',
    'x://u:s3cret@a:1',
  ])('that is malformed is told without its password: %s', (text) => {
    for (const read of [parseEtcdAddress, (raw: string) => parseValue(etcdAddress(), raw, '--registry')]) {
      let message = '';
      try {
        read(text);
      } catch (error) {
        message = (error as Error).message;
      }
      expect(message).not.toBe('');
      expect(message).not.toMatch(/s3|cret/);
    }
  });
});

describe('as a user', () => {
  const servers: ReturnType<typeof createServer>[] = [];
  afterEach(() => {
    for (const server of servers.splice(0)) server.close();
  });

  /** `tokens`: what it gives out, one after the other; `takes`: whether a token is still good. */
  async function asking(
    tokens: readonly string[],
    takes: (token: string | undefined) => boolean,
    status = 401,
  ) {
    const seen: string[] = [];
    let given = 0;
    const server = createServer((request, out) => {
      const path = request.url!.replace('/v3/', '');
      const token = request.headers.authorization;
      seen.push(`${path} ${token ?? '-'}`);
      if (path === 'auth/authenticate') out.end(JSON.stringify({ token: tokens[given++] }));
      else if (takes(token)) out.end('{"header":{"revision":"7"}}');
      else out.writeHead(status).end(JSON.stringify({ error: 'etcdserver: user name is empty' }));
    }).listen(0, '127.0.0.1');
    servers.push(server);
    await new Promise((resolve) => server.once('listening', resolve));
    const endpoints = [{ host: '127.0.0.1', port: (server.address() as AddressInfo).port }];
    const etcd = new Etcd({ endpoints, secure: false, prefix: 'x/', user: { name: 'u', password: 'p' } });
    return { seen, list: () => etcd.list(AbortSignal.timeout(60_000)) };
  }

  it('a token is asked for once, and again when it counts no longer', async () => {
    let good = 'one';
    const { seen, list } = await asking(['one', 'two'], (token) => token === good);
    await list();
    await list();
    good = 'two';
    await list();
    expect(seen).toEqual([
      ...['auth/authenticate -', 'kv/range one', 'kv/range one', 'kv/range one'],
      ...['auth/authenticate -', 'kv/range two'],
    ]);
  });

  it.each([401, 400])('one whose tokens never count (%i) is not asked without end', async (status) => {
    const { seen, list } = await asking(['one', 'two', 'three'], () => false, status);
    await expect(list()).rejects.toMatchObject({
      code: 'REGISTRY_FAILED',
      message: expect.stringContaining(`status ${status}: etcdserver: user name is empty`),
    });
    expect(seen.filter((one) => one.startsWith('auth'))).toHaveLength(2);
  });
});
