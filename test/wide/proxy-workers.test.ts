/** A proxy of several processes: one owns what all requests share, and each of the others may die without the rest. */
import { once } from 'node:events';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import type { ServerResponse } from 'node:http';
import { connect } from 'node:net';
import { join } from 'node:path';
import { text } from 'node:stream/consumers';
import { Agent, type Dispatcher, request } from 'undici';
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from 'vitest';
import { formatHostPort } from '../../src/net/address.ts';
import type { PdProxy } from '../../src/proxy/proxy.ts';
import { type Answer, answerJson, FakeUpstream, sendPing } from '../support/fake-upstream.ts';
import { OtlpReceiver } from '../support/otlp-receiver.ts';
import { startQuietProxy } from '../support/quiet-proxy.ts';
import { sharedTempDir } from '../support/temp-dir.ts';

const dir = sharedTempDir();
let proxy: PdProxy;
let producer: FakeUpstream;
let consumer: FakeUpstream;
let receiver: OtlpReceiver;
/** Answers to `stream` are the test's. */
const streams: ServerResponse[] = [];
/** What the consumer answers instead, while it is set. */
let telling: Answer | undefined;

beforeAll(async () => {
  receiver = await OtlpReceiver.start();
  proxy = await startQuietProxy({ workers: 2, otlpEndpoint: receiver.url });
  producer = await FakeUpstream.start('producer', answerJson());
  consumer = await FakeUpstream.start('consumer', async (asked, out) => {
    if (telling) return await telling(asked, out);
    if (asked.json['stream'] !== true) return await answerJson()(asked, out);
    out.writeHead(200, { 'content-type': 'text/event-stream' });
    out.flushHeaders();
    streams.push(out);
  });
  for (const instance of [producer, consumer]) await instance.ping(proxy.discoveryAddress);
  await proxy.untilPaired();
});

afterAll(async () => {
  await proxy.close(0);
  await producer.kill();
  await consumer.kill();
  await receiver.close();
});

const url = (path: string) => `http://${formatHostPort(proxy.httpAddress)}${path}`;

/** Over a connection of its own, so that processes take turns. */
function post(body: object) {
  return request(url('/v1/completions'), {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ model: 'm', prompt: 'Hello world', ...body }),
    dispatcher: new Agent({ connections: 1 }),
  });
}

const counted = async (series: RegExp, of = proxy) => {
  const text = await (await fetch(`http://${formatHostPort(of.httpAddress)}/metrics`)).text();
  return Number(new RegExp(`^${series.source} (\\d+)$`, 'm').exec(text)?.[1] ?? 0);
};
const completed = () => counted(/pd_proxy_requests_total\{[^}]*status="200"[^}]*\}/);

/** Of processes that relay. */
function relayPids(): number[] {
  return readdirSync('/proc/self/task')
    .flatMap((task) => readFileSync(`/proc/self/task/${task}/children`, 'latin1').trim().split(' '))
    .filter((pid) => pid !== '' && readFileSync(`/proc/${pid}/cmdline`, 'latin1').includes('relay-process'))
    .map(Number);
}

test('answers from both processes, and tells of itself as one', async () => {
  const answers = await Promise.all(Array.from({ length: 6 }, () => post({})));
  expect(answers.map(({ statusCode }) => statusCode)).toEqual(Array(6).fill(200));
  for (const answer of answers) expect(answer.headers['x-request-id']).toContain(consumer.zmqAddress);
  expect(await completed()).toBe(6);
  expect(await counted(/pd_proxy_request_duration_seconds_count\{[^}]*\}/)).toBe(6);
  for (const role of ['producer', 'consumer'])
    expect(
      await counted(new RegExp(`pd_proxy_worker_requests_total\\{.*role="${role}",outcome="success"\\}`)),
    ).toBe(6);
  for (const { headers } of answers) {
    const route = await fetch(url(`/v1/requests/${headers['x-pd-request-id']}/route`));
    expect(await route.json()).toMatchObject({
      status: 200,
      attempts: [{ request_id: headers['x-request-id'], consumer: { considered: 1 }, outcome: 'answered' }],
    });
  }
  const roots = () => receiver.spans.filter(({ name }) => name === 'POST /v1/completions');
  while (roots().length < 6) await once(receiver.events, 'post');
  expect(roots().map(({ attributes }) => attributes['pd.request_id'])).toEqual(
    expect.arrayContaining(answers.map(({ headers }) => headers['x-pd-request-id'])),
  );
  const health = (await (await fetch(url('/health'))).json()) as { counts: object };
  expect(health.counts).toEqual({ producer: 1, consumer: 1 });
  const body = JSON.stringify({ instance: consumer.httpAddress });
  const drained = await fetch(url('/admin/drain'), { method: 'POST', body });
  expect(await drained.json()).toMatchObject({ draining: true, requests_under_way: 0 });
  expect((await post({})).statusCode).toBe(503);
  const undone = JSON.stringify({ instance: consumer.httpAddress, drain: false });
  expect((await fetch(url('/admin/drain'), { method: 'POST', body: undone })).status).toBe(200);
});

describe('as with one process', () => {
  let alone: PdProxy;
  beforeAll(async () => {
    alone = await startQuietProxy();
    for (const instance of [producer, consumer]) await instance.ping(alone.discoveryAddress);
    await alone.untilPaired();
  });
  afterAll(() => alone.close(0));

  /** What one proxy answers, over a connection of its own. */
  async function ask(
    of: PdProxy,
    method: string,
    path: string,
    headers: Record<string, string>,
    body: string | null = null,
  ) {
    const dispatcher = new Agent({ connections: 1 });
    const asked = { method: method as Dispatcher.HttpMethod, headers, body, dispatcher };
    const answer = await request(`http://${formatHostPort(of.httpAddress)}${path}`, asked);
    const text = await answer.body.text();
    await dispatcher.close();
    const { allow, 'accept-encoding': encoding } = answer.headers;
    const { error } = (text.startsWith('{') ? JSON.parse(text) : {}) as { error?: { code?: string } };
    const code = error?.code;
    return { status: answer.statusCode, allow, encoding, code, text };
  }

  const CHAT = '/v1/chat/completions';
  const notAllowed = (allow: string) => ({ status: 405, allow, code: 'METHOD_NOT_ALLOWED' });
  const encoded = { status: 415, encoding: 'identity', code: 'BODY_ENCODED' };
  test.each<[string, string, string | undefined, object]>([
    ['GET', '/v1/completions', undefined, notAllowed('POST')],
    ['DELETE', '/v1/responses?a=b', undefined, notAllowed('POST')],
    ['PROPFIND', CHAT, undefined, notAllowed('POST')],
    ['HEAD', CHAT, undefined, { status: 405, allow: 'POST' }],
    ['POST', '/v1/models', undefined, notAllowed('GET, HEAD')],
    ['POST', '/v1/requests/1/route', undefined, notAllowed('GET, HEAD')],
    ['POST', '/health', undefined, notAllowed('GET, HEAD')],
    ['PROPFIND', '/health', undefined, notAllowed('GET, HEAD')],
    ['POST', '/ui/events', undefined, notAllowed('GET')],
    ['HEAD', '/ui/events', undefined, { status: 404 }],
    ['DELETE', '/ui/ui.css', undefined, notAllowed('GET, HEAD')],
    ['GET', '/admin/drain', undefined, notAllowed('POST')],
    ['POST', '/v1/embeddings', undefined, { status: 404, code: 'REQUEST_INVALID' }],
    ['PROPFIND', '/v1/embeddings', undefined, { status: 404, code: 'REQUEST_INVALID' }],
    ['POST', '/v1/embeddings', 'gzip', { status: 404, code: 'REQUEST_INVALID' }],
    ['GET', '/v1/completions', 'gzip', notAllowed('POST')],
    ['POST', '/v1/completions', 'gzip', encoded],
    ['POST', CHAT, 'GZIP, br', encoded],
    ['POST', '/admin/drain', 'deflate', encoded],
    ['POST', '/v1/completions', 'identity', { status: 200 }],
  ])('%s %s in encoding %s', async (method, path, encoding, expected) => {
    const headers = {
      'content-type': 'application/json',
      ...(encoding !== undefined && { 'content-encoding': encoding }),
    };
    const body = method === 'POST' ? JSON.stringify({ model: 'm', prompt: 'Hello' }) : null;
    const one = await ask(alone, method, path, headers, body);
    expect(one).toMatchObject(expected);
    // Of its two processes both.
    for (let i = 0; i < 2; i++) {
      const { text, ...other } = await ask(proxy, method, path, headers, body);
      expect(other).toEqual({ ...one, text: undefined });
      if (one.status !== 200) expect(text).toBe(one.text); // that has an id
    }
  });

  /** Each on a connection of its own: the answer, once the proxy has ended that. */
  function raw({ httpAddress: { host, port } }: PdProxy, request: string): Promise<string> {
    const client = connect({ host, port });
    client.write(request);
    return text(client);
  }

  test.each(['HTTP/1.0\r\n', 'HTTP/1.1\r\nhost: x\r\nconnection: close\r\n'])(
    'a connection that is for one request ends with its answer: %j',
    async (version) => {
      for (const path of ['/health', '/nothing'])
        for (const of of [alone, proxy, proxy]) {
          const answer = await raw(of, `GET ${path} ${version}\r\n`);
          expect(answer).toMatch(/^HTTP\/1\.1 (200|404) /);
          expect(answer).toMatch(/^connection: close\r$/im);
        }
    },
  );

  test('a body that belongs to no GET is not the beginning of the next request, whoever sends that', async () => {
    const head = 'GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n';
    for (const body of [
      'content-length: 40\r\n\r\n'.padEnd(62),
      'transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n',
    ])
      for (const of of [alone, proxy, proxy]) {
        for (const rest of [body, '\r\n', '\r\n', '\r\n'])
          expect(await raw(of, head + rest)).toMatch(/^HTTP\/1\.1 200 .*\{"ready":true\}$/s);
      }
  });

  test('counts what is refused unread', async () => {
    const series = [
      ['/v1/completions', 405, 'METHOD_NOT_ALLOWED', 'GET', undefined],
      ['/v1/responses', 415, 'BODY_ENCODED', 'POST', 'gzip'],
    ] as const;
    for (const [route, status, code, method, encoding] of series) {
      const byStatus = new RegExp(`pd_proxy_requests_total\\{route="${route}",status="${status}"\\}`);
      const byCode = new RegExp(`pd_proxy_request_errors_total\\{route="${route}",code="${code}"\\}`);
      for (const of of [alone, proxy]) {
        const before = [await counted(byStatus, of), await counted(byCode, of)];
        for (let i = 0; i < 2; i++)
          await ask(of, method, route, encoding === undefined ? {} : { 'content-encoding': encoding });
        const after = [await counted(byStatus, of), await counted(byCode, of)];
        expect(after).toEqual(before.map((count) => count + 2));
      }
    }
  });

  test('what ended a choice reaches the client as the consumer said it', async () => {
    const choice = { index: 0, finish_reason: 'stop', stop_reason: 'END' };
    const streamed = `data: ${JSON.stringify({ choices: [{ ...choice, text: 'x' }] })}\n\ndata: [DONE]\n\n`;
    telling = (asked, out) => {
      if (asked.json['stream'] !== true) return answerJson(200, { choices: [choice] })(asked, out);
      out.writeHead(200, { 'content-type': 'text/event-stream' });
      out.end(streamed);
    };
    try {
      const headers = { 'content-type': 'application/json' };
      for (const of of [alone, proxy, proxy]) {
        const body = { model: 'm', prompt: 'Hello', stop: 'END' };
        const whole = await ask(of, 'POST', '/v1/completions', headers, JSON.stringify(body));
        expect(JSON.parse(whole.text)).toMatchObject({ choices: [choice] });
        const asked = JSON.stringify({ ...body, stream: true });
        expect(await ask(of, 'POST', '/v1/completions', headers, asked)).toMatchObject({ text: streamed });
      }
    } finally {
      telling = undefined;
    }
  });

  test('a request that comes back is refused, and not asked again and again', async () => {
    const ring: PdProxy[] = [];
    try {
      for (let i = 0; i < 2; i++) ring.push(await startQuietProxy({ workers: 2 }));
      for (const [i, { discoveryAddress }] of ring.entries()) {
        await consumer.ping(discoveryAddress);
        const http_address = formatHostPort(ring[(i + 1) % ring.length]!.httpAddress);
        await sendPing(discoveryAddress, { type: 'P', http_address, zmq_address: '127.0.0.1:1' });
      }
      await Promise.all(ring.map((one) => one.untilPaired()));
      // Each of the four processes is where it begins.
      for (const of of [...ring, ...ring]) {
        const headers = { 'content-type': 'application/json' };
        const body = JSON.stringify({ model: 'm', prompt: 'Hello' });
        const answer = await ask(of, 'POST', '/v1/completions', headers, body);
        expect(answer).toMatchObject({ status: 400, code: 'REQUEST_INVALID' });
        expect(answer.text).toContain('leads back');
      }
    } finally {
      await Promise.all(ring.map((one) => one.close(0)));
    }
  });
});

test('with keys, both ask for them: the same of the same paths', async () => {
  const client = 'sk-client-0123456789abcdef';
  const apiKeyFile = join(dir, 'keys');
  writeFileSync(apiKeyFile, `client ${client}\n`);
  const keyed = await Promise.all(
    [1, 2].map((workers) => startQuietProxy({ workers, access: { apiKeyFile } })),
  );
  try {
    const paths = ['/health', '/v1/models', '/nothing', '/debug/state', '/ui', '/ui/events', '/admin/drain'];
    const statuses = async (of: PdProxy, headers: Record<string, string>) => {
      const asking = paths.map(async (path) => {
        const method = path === '/admin/drain' ? 'POST' : 'GET';
        const answer = await fetch(`http://${formatHostPort(of.httpAddress)}${path}`, { method, headers });
        await answer.body?.cancel();
        return answer.status;
      });
      return await Promise.all(asking);
    };
    for (const of of keyed) {
      expect(await statuses(of, {})).toEqual([200, 401, 401, 401, 200, 401, 401]);
      const authorization = `Bearer ${client}`;
      expect(await statuses(of, { authorization })).toEqual([200, 200, 404, 404, 200, 403, 403]);
    }
  } finally {
    await Promise.all(keyed.map((one) => one.close(0)));
  }
});

test('a process that is killed takes only its own requests with it, and another takes its place', async () => {
  const before = await completed();
  const [one, other] = await Promise.all([post({ stream: true }), post({ stream: true })]);
  const bodies = [one.body.text(), other.body.text()].map((text) =>
    text.then(
      () => 'whole',
      () => 'broken',
    ),
  );
  const [victim, spared] = relayPids() as [number, number];
  process.kill(victim, 'SIGKILL');
  expect(await Promise.race(bodies)).toBe('broken');
  for (const out of streams.splice(0)) out.end('data: [DONE]\n\n');
  expect((await Promise.all(bodies)).sort()).toEqual(['broken', 'whole']);
  while (relayPids().filter((pid) => pid !== victim).length < 2) await new Promise((r) => setImmediate(r));
  for (let i = 0; i < 4; i++) expect((await post({})).statusCode).toBe(200);
  expect(await completed()).toBeGreaterThanOrEqual(before + 5);
  // It answers too, which shows once the other one is no more.
  process.kill(spared, 'SIGKILL');
  const replaced = () => relayPids().filter((pid) => pid !== victim && pid !== spared);
  while (replaced().length < 2) await new Promise((r) => setImmediate(r));
  expect((await post({})).statusCode).toBe(200);
});

test.each(['is killed', 'stands still'])(
  'connections on their way to a process that %s go to another',
  async (what) => {
    const [stopped] = relayPids() as [number];
    process.kill(stopped, 'SIGSTOP');
    // One that was not ready yet gets no connection: it is not to stand still for ever.
    onTestFinished(() => {
      if (relayPids().includes(stopped)) process.kill(stopped, 'SIGKILL');
    });
    const body = JSON.stringify({ model: 'm', prompt: 'Hello world' });
    const { host, port } = proxy.httpAddress;
    const head = `POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n`;
    const clients = Array.from({ length: 8 }, () => connect({ host, port }));
    const statuses = clients.map(async (client) => {
      client.write(`${head}content-length: ${body.length}\r\n\r\n${body}`);
      return (await text(client)).slice(0, 'HTTP/1.1 200'.length);
    });
    const ends = Promise.allSettled(statuses);
    await Promise.all(clients.map((client) => once(client, 'connect')));
    // This process is the one that hands them over, half of them to the one that is stopped.
    await new Promise((resolve) => setImmediate(resolve));
    if (what === 'is killed') process.kill(stopped, 'SIGKILL');
    const served = (await ends).flatMap((one) => (one.status === 'fulfilled' ? [one.value] : []));
    // One at most was with it: the next is sent once that has been taken.
    expect(served.filter((status) => status === 'HTTP/1.1 200').length).toBeGreaterThanOrEqual(7);
  },
);

test('closing lets requests under way end', async () => {
  const asked = once(consumer.events, 'asked');
  const answer = await post({ stream: true });
  await asked;
  const closed = proxy.close(60_000);
  streams.pop()!.end('data: late\n\n');
  expect(await answer.body.text()).toBe('data: late\n\n');
  await closed;
  expect(relayPids()).toEqual([]);
});
