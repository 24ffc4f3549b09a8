/** Keys, TLS and CORS at the proxy, tried as a stranger would, with instances that record what reaches them. */
import { once } from 'node:events';
import { copyFileSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { request as plainRequest } from 'node:http';
import { request } from 'node:https';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { afterEach, beforeAll, describe, expect, it, test } from 'vitest';
import { formatHostPort, parseHostPort } from '../../../src/net/address.ts';
import type { PdProxy } from '../../../src/proxy/proxy.ts';
import { Authority, type Certificate } from '../../../support/certificates.ts';
import { answerJson, FakeUpstream } from '../../support/fake-upstream.ts';
import { startQuietProxy } from '../../support/quiet-proxy.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';

const CLIENT = 'sk-client-0123456789abcdef';
const OPERATOR = 'sk-operator-0123456789abcdef';
const OLD = 'sk-old-0123456789abcdef';
const WORKER = 'sk-worker-0123456789abcdef';
const BODY = JSON.stringify({ model: 'm', prompt: 'Hello', max_tokens: 1 });

const closing: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

const DIR = sharedTempDir();
let files = 0;

function fileOf(content: string): string {
  const path = join(DIR, `${files++}`);
  writeFileSync(path, content);
  return path;
}

const clientKeys = () =>
  fileOf(`client ${CLIENT}\noperator ${OPERATOR} admin\nold ${OLD} until=2026-01-01\n`);

async function startProxy(settings: Parameters<typeof startQuietProxy>[0]): Promise<PdProxy> {
  const proxy = await startQuietProxy(settings);
  closing.push(() => proxy.close(0));
  return proxy;
}

async function pairFor(proxy: PdProxy, tls?: Certificate & { readonly ca?: string }) {
  const both = await Promise.all(
    (['producer', 'consumer'] as const).map((role) => FakeUpstream.start(role, answerJson(), tls && { tls })),
  );
  for (const one of both) {
    closing.push(() => one.kill());
    await one.ping(proxy.discoveryAddress, 'd1', tls ? ['tls'] : []);
  }
  return both;
}

const url = (proxy: PdProxy, path: string) => `http://${formatHostPort(proxy.httpAddress)}${path}`;
const post = (proxy: PdProxy, headers: Record<string, string> = {}, path = '/v1/completions', body = BODY) =>
  fetch(url(proxy, path), { method: 'POST', body, headers });
const bearer = (key: string) => ({ authorization: `Bearer ${key}` });

describe('with keys', () => {
  it.each([
    ['no key', {}, 401, 'this server needs a key: send `Authorization: Bearer KEY`'],
    ['a wrong one', bearer(`${CLIENT}x`), 401, 'this key is not known here'],
    ['an expired one', bearer(OLD), 401, 'this key has expired'],
  ])('a request with %s is refused in OpenAI’s form', async (_, headers, status, message) => {
    const proxy = await startProxy({ access: { apiKeyFile: clientKeys() } });
    const answer = await post(proxy, headers);
    expect([answer.status, answer.headers.get('www-authenticate')]).toEqual([status, 'Bearer']);
    expect(await answer.json()).toEqual({
      error: { message, type: 'invalid_request_error', param: null, code: 'invalid_api_key' },
    });
    for (const path of ['/v1/models', '/openapi.json', '/nowhere'])
      expect((await fetch(url(proxy, path), { headers })).status).toBe(401);
    for (const path of ['/health', '/ready', '/metrics'])
      expect((await fetch(url(proxy, path))).status).not.toBe(401);
  });

  it('a client’s key does not reach the instances: they get the proxy’s own, or none', async () => {
    const workerKeyFile = fileOf(`proxy ${WORKER}\n`);
    for (const [more, expected] of [
      [{}, undefined],
      [{ upstream: { keyFile: workerKeyFile }, allowInstances: ['127.0.0.1'] }, `Bearer ${WORKER}`],
    ] as const) {
      const proxy = await startProxy({ access: { apiKeyFile: clientKeys() }, ...more });
      const instances = await pairFor(proxy);
      await proxy.untilPaired();
      expect((await post(proxy, bearer(CLIENT))).status).toBe(200);
      for (const { asked } of instances) {
        expect(asked.map(({ headers }) => headers.authorization)).toEqual([expected]);
        expect(JSON.stringify(asked)).not.toContain(CLIENT);
      }
      const metrics = await (await fetch(url(proxy, '/metrics'))).text();
      expect(metrics).toContain('pd_proxy_key_requests_total{key="client"} 1');
      expect(metrics).not.toContain(CLIENT);
    }
  });

  it('admin calls take an admin key', async () => {
    const proxy = await startProxy({ access: { apiKeyFile: clientKeys() } });
    const [producer] = await pairFor(proxy);
    await proxy.untilPaired();
    const body = JSON.stringify({ instance: producer!.httpAddress });
    const drain = (key: string) => post(proxy, bearer(key), '/admin/drain', body);
    const forbidden = await drain(CLIENT);
    expect([forbidden.status, await forbidden.json()]).toMatchObject([
      403,
      { error: { type: 'permission_error', code: 'KEY_FORBIDDEN' } },
    ]);
    expect((await drain(OPERATOR)).status).toBe(200);
  });

  it('a key that is replaced in the file is refused from then on, and requests under way go on', async () => {
    const path = clientKeys();
    const proxy = await startProxy({ access: { apiKeyFile: path } });
    const [, consumer] = await pairFor(proxy);
    await proxy.untilPaired();
    const asked = once(consumer!.events, 'asked');
    const running = post(proxy, bearer(CLIENT));
    await asked;
    writeFileSync(`${path}.new`, `operator ${OPERATOR}\n`);
    renameSync(`${path}.new`, path);
    while ((await fetch(url(proxy, '/v1/models'), { headers: bearer(CLIENT) })).status !== 401);
    expect((await running).status).toBe(200);
    expect((await fetch(url(proxy, '/v1/models'), { headers: bearer(OPERATOR) })).status).toBe(200);
  });

  it('an instance outside of --allow-instances gets none, whoever pings for it', async () => {
    const upstream = { keyFile: fileOf(`proxy ${WORKER}\n`) };
    await expect(startProxy({ upstream })).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
      message: expect.stringContaining('--worker-key-file needs --allow-instances'),
    });
    const proxy = await startProxy({ upstream, allowInstances: ['127.0.0.1'] });
    const elsewhere = await FakeUpstream.start('producer', answerJson(), { host: '127.0.0.2' });
    closing.push(() => elsewhere.kill());
    await elsewhere.ping(proxy.discoveryAddress, 'd1');
    const badPings = async () =>
      /pd_proxy_bad_pings_total (\d+)/.exec(await (await fetch(url(proxy, '/metrics'))).text())?.[1];
    while ((await badPings()) !== '1');
    expect(proxy.instances).toEqual([]);
  });

  it('instances that are named get it without --allow-instances, and who pings does not', async () => {
    const [producer, consumer, other] = await Promise.all(
      (['producer', 'consumer', 'consumer'] as const).map((role) => FakeUpstream.start(role, answerJson())),
    );
    for (const one of [producer!, consumer!, other!]) closing.push(() => one.kill());
    // One of ours, and one that is not.
    producer!.instance = producer!.pingOf();
    const told = { role: 'consumer', kv: parseHostPort(consumer!.zmqAddress) } as const;
    const proxy = await startProxy({
      upstream: { keyFile: fileOf(`proxy ${WORKER}\n`) },
      instances: [
        { http: parseHostPort(producer!.httpAddress), tls: false },
        { http: parseHostPort(consumer!.httpAddress), tls: false, told },
      ],
    });
    await proxy.untilPaired();
    await other!.ping(proxy.discoveryAddress);
    await consumer!.ping(proxy.discoveryAddress);
    const badPings = async () =>
      /pd_proxy_bad_pings_total (\d+)/.exec(await (await fetch(url(proxy, '/metrics'))).text())?.[1];
    while ((await badPings()) !== '2');
    expect(proxy.instances.map(({ httpAddress }) => httpAddress).sort()).toEqual(
      [producer!.httpAddress, consumer!.httpAddress].sort(),
    );
    expect((await post(proxy)).status).toBe(200);
    const shown = [producer!.instanceKey, consumer!.asked[0]!.headers.authorization];
    expect(shown).toEqual([`Bearer ${WORKER}`, `Bearer ${WORKER}`]);
  });
});

describe('with TLS', () => {
  let authority: Authority;
  let server: Certificate;
  let client: Certificate;
  let expired: Certificate;
  let stranger: Authority;
  beforeAll(() => {
    authority = new Authority(DIR);
    stranger = new Authority(DIR, 'stranger');
    server = authority.sign('server');
    client = authority.sign('client');
    expired = authority.sign('expired', { expired: true });
  });

  const securely = async (proxy: PdProxy, options: object = {}) => {
    const { host, port } = proxy.httpAddress;
    const asked = request({
      host,
      port,
      path: '/health',
      ca: readFileSync(authority.ca),
      agent: false,
      ...options,
    });
    const [answer] = await once(asked.end(), 'response');
    return {
      status: answer.statusCode as number,
      from: answer.socket.getPeerCertificate().subject.CN,
      body: await text(answer),
    };
  };

  it('serves https alone, to clients with a certificate where that is asked for', async () => {
    const tls = { tlsCert: server.cert, tlsKey: server.key };
    const open = await startProxy({ access: tls });
    expect(await securely(open)).toMatchObject({ status: 200, from: 'server' });
    const { host, port } = open.httpAddress;
    await expect(once(plainRequest({ host, port, agent: false }).end(), 'response')).rejects.toThrow();
    const closed = await startProxy({ access: { ...tls, tlsClientCa: authority.ca } });
    await expect(securely(closed)).rejects.toThrow();
    const foreign = stranger.sign('client');
    await expect(
      securely(closed, { cert: readFileSync(foreign.cert), key: readFileSync(foreign.key) }),
    ).rejects.toThrow();
    const shown = { cert: readFileSync(client.cert), key: readFileSync(client.key) };
    expect(await securely(closed, shown)).toMatchObject({ status: 200 });
  });

  it('takes a new certificate without a restart', async () => {
    const [tlsCert, tlsKey] = [join(DIR, 'cert.pem'), join(DIR, 'key.pem')];
    copyFileSync(server.cert, tlsCert);
    copyFileSync(server.key, tlsKey);
    const proxy = await startProxy({ access: { tlsCert, tlsKey } });
    const next = authority.sign('next');
    copyFileSync(next.key, tlsKey);
    copyFileSync(next.cert, tlsCert);
    while ((await securely(proxy)).from !== 'next');
  });

  it('asks instances over TLS, and none whose certificate does not hold', async () => {
    const ask = async (certificate: Certificate, upstream: object) => {
      const proxy = await startProxy({ upstream: { ca: authority.ca, ...upstream } });
      await pairFor(proxy, { ...certificate, ca: authority.ca });
      await proxy.untilPaired();
      const answer = await post(proxy);
      return [answer.status, await answer.text()] as const;
    };
    const shown = { cert: client.cert, key: client.key };
    expect((await ask(server, shown))[0]).toBe(200);
    expect((await ask(server, { ...shown, tlsName: 'server' }))[0]).toBe(200);
    for (const [certificate, upstream, why] of [
      [server, {}, ''], // it asks for a certificate of ours
      [server, { ...shown, tlsName: 'other' }, 'other'],
      [expired, shown, 'expired'],
      [stranger.sign('server'), shown, ''],
    ] as const) {
      const [status, body] = await ask(certificate, upstream);
      expect(status).toBe(502);
      expect(body).toContain(why);
    }
  });

  it('takes no instance without TLS where certificates are to be checked', async () => {
    const proxy = await startProxy({ upstream: { ca: authority.ca } });
    await pairFor(proxy);
    const badPings = async () =>
      /pd_proxy_bad_pings_total (\d+)/.exec(await (await fetch(url(proxy, '/metrics'))).text())?.[1];
    while ((await badPings()) !== '2');
    expect(proxy.instances).toEqual([]);
  });

  it.each([
    ['a certificate without its key', () => ({ tlsCert: server.cert }), '--tls-cert needs --tls-key'],
    ['a key of another', () => ({ tlsCert: server.cert, tlsKey: client.key }), '--tls-cert'],
    ['a file that is not there', () => ({ tlsCert: '/nowhere', tlsKey: server.key }), '--tls-cert: ENOENT'],
    ['authorities alone', () => ({ tlsClientCa: authority.ca }), '--tls-client-ca needs --tls-cert'],
  ])('does not start with %s', async (_, access, message) => {
    await expect(startProxy({ access: access() })).rejects.toMatchObject({
      code: 'CONFIG_INVALID',
      message: expect.stringContaining(message),
    });
  });
});

test('pages of the origins named may call, and those alone', async () => {
  const proxy = await startProxy({ access: { corsOrigins: ['https://chat.example'] } });
  await pairFor(proxy);
  await proxy.untilPaired();
  const preflight = await fetch(url(proxy, '/v1/completions'), {
    method: 'OPTIONS',
    headers: {
      origin: 'https://chat.example',
      'access-control-request-method': 'POST',
      'access-control-request-headers': 'authorization, content-type',
    },
  });
  expect([preflight.status, Object.fromEntries(preflight.headers)]).toMatchObject([
    204,
    {
      'access-control-allow-origin': 'https://chat.example',
      'access-control-allow-headers': 'authorization, content-type',
    },
  ]);
  const allowed = async (origin: string) =>
    (await post(proxy, { origin })).headers.get('access-control-allow-origin');
  expect(await allowed('https://chat.example')).toBe('https://chat.example');
  expect(await allowed('https://elsewhere.example')).toBeNull();
});
