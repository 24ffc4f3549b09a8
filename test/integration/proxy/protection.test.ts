/** What a proxy does for its clients and its instances when there is too much to do, or one of them fails. */
import { once } from 'node:events';
import type { ServerResponse } from 'node:http';
import { describe, expect, test } from 'vitest';
import type { PdProxy } from '../../../src/proxy/proxy.ts';
import type { Answer } from '../../support/fake-upstream.ts';
import { startProxy, startUpstream, url } from '../../support/proxies.ts';

const post = (proxy: PdProxy, more: object = {}, init: RequestInit = {}) =>
  fetch(url(proxy, '/v1/completions'), {
    method: 'POST',
    body: JSON.stringify({ model: 'm', prompt: 'Hello', ...more }),
    ...init,
  });
const metric = async (proxy: PdProxy, name: string) => {
  const text = await (await fetch(url(proxy, '/metrics'))).text();
  return Number(
    text
      .split('\n')
      .find((line) => line.startsWith(`${name} `))
      ?.split(' ')[1],
  );
};

test('over its limits requests wait, and beyond the queue are answered 429 as OpenAI does', async () => {
  const proxy = await startProxy({ maxRunning: 1, maxQueued: 1 });
  const held: ServerResponse[] = [];
  const producer = await startUpstream(proxy, 'producer', (_, out) => void held.push(out));
  await startUpstream(proxy, 'consumer');
  const asked = once(producer.events, 'asked');
  const first = post(proxy);
  await asked;
  const second = post(proxy);
  while ((await metric(proxy, 'pd_proxy_requests_queued')) !== 1);
  const third = await post(proxy);
  expect([third.status, third.headers.get('retry-after')]).toEqual([429, '1']);
  expect(await third.json()).toEqual({
    error: {
      message: 'the limit is 1 request at a time, and the queue is full',
      type: 'rate_limit_error',
      param: null,
      code: 'rate_limit_exceeded',
    },
  });
  const urgent = post(proxy, {}, { headers: { 'x-priority': '-1' } });
  expect((await second).status).toBe(429);
  const again = once(producer.events, 'asked');
  held.shift()!.end('{}');
  expect((await first).status).toBe(200);
  await again;
  held.shift()!.end('{}');
  expect((await urgent).status).toBe(200);
});

test('at several times its capacity as much is served as there is room for, and the rest is told at once', async () => {
  const [room, queue, burst] = [4, 4, 24];
  const proxy = await startProxy({ maxRunning: room, maxQueued: queue });
  await startUpstream(proxy, 'producer');
  const held: ServerResponse[] = [];
  const consumer = await startUpstream(proxy, 'consumer', (_, out) => void held.push(out));
  let served = 0;
  let refused = 0;
  for (let wave = 0; wave < 3; wave++) {
    const answers = Array.from({ length: burst }, async () => {
      const { status } = await post(proxy);
      if (status === 429) refused++;
      return status;
    });
    // Before any of those that are served has an answer.
    while (refused < (wave + 1) * (burst - room - queue))
      await new Promise((resolve) => setImmediate(resolve));
    for (let left = room + queue; left > 0; left--) {
      const busy = Math.min(room, left);
      while (held.length < busy) await once(consumer.events, 'asked');
      expect(held).toHaveLength(busy);
      held.shift()!.end('{}');
    }
    served += (await Promise.all(answers)).filter((status) => status === 200).length;
  }
  expect([served, refused]).toEqual([3 * (room + queue), 3 * (burst - room - queue)]);
});

describe('before a byte has been passed on, another pair is tried', () => {
  const dies: Answer = (_, out) => {
    out.writeHead(200, { 'content-type': 'text/event-stream' });
    out.flushHeaders();
    out.socket!.resetAndDestroy();
  };

  const streams: Answer = (_, out) => {
    out.writeHead(200, { 'content-type': 'text/event-stream' });
    out.end('data: {}\n\ndata: [DONE]\n\n');
  };

  test('where a consumer dies after its headers', async () => {
    const proxy = await startProxy();
    await startUpstream(proxy, 'producer');
    await startUpstream(proxy, 'producer');
    const dead = await startUpstream(proxy, 'consumer', dies);
    const well = await startUpstream(proxy, 'consumer', streams);
    for (let i = 0; i < 3; i++) {
      const response = await post(proxy, { stream: true });
      expect([response.status, await response.text()]).toEqual([200, 'data: {}\n\ndata: [DONE]\n\n']);
    }
    expect(await metric(proxy, 'pd_proxy_retries_total{result="tried"}')).toBe(1);
    const of = ({ httpAddress }: typeof dead) => `worker="${httpAddress}",role="consumer"`;
    expect(
      await Promise.all(
        [
          `retries_total{${of(dead)}}`,
          `requests_total{${of(dead)},outcome="refused"}`,
          `requests_total{${of(well)},outcome="success"}`,
          `time_to_first_token_seconds_count{${of(well)}}`,
        ].map((series) => metric(proxy, `pd_proxy_worker_${series}`)),
      ),
    ).toEqual([1, 1, 3, 3]);
  });

  test('three times, and where all fail the last failure is told', async () => {
    const proxy = await startProxy();
    await startUpstream(proxy, 'producer');
    for (let i = 0; i < 6; i++) await startUpstream(proxy, 'consumer', dies);
    const response = await post(proxy, { stream: true });
    expect(await response.text()).toMatch(
      /^data: \{"error":.*broke off before a byte of it.*\n\ndata: \[DONE\]\n\n$/,
    );
    expect(await metric(proxy, 'pd_proxy_retries_total{result="tried"}')).toBe(3);
  });
});

test('an instance that answers with errors of the server three times is let alone', async () => {
  const proxy = await startProxy();
  const bad = await startUpstream(proxy, 'producer', (_, out) => {
    out.writeHead(500, { 'content-type': 'application/json' }).end('{"error":{"message":"broken"}}');
  });
  await startUpstream(proxy, 'producer');
  await startUpstream(proxy, 'consumer');
  const statuses = await Promise.all([1, 2, 3, 4, 5, 6].map(async () => (await post(proxy)).status));
  expect(statuses.filter((status) => status === 500)).toHaveLength(3);
  const labels = `worker="${bad.httpAddress}",role="producer"`;
  expect(await metric(proxy, `pd_proxy_worker_requests_total{${labels},outcome="failure"}`)).toBe(3);
  // When it is tried again is in test/unit/proxy/breaker.test.ts; here, that it is not asked as often as before.
  for (let i = 0; i < 20; i++) await post(proxy);
  expect(bad.asked.length).toBeLessThan(10);
});

test('an instance that has too much to read is not held to have failed', async () => {
  const proxy = await startProxy();
  const busy = '{"error":{"message":"the reader was busy","code":"READER_BUSY"}}';
  const reading = await startUpstream(proxy, 'producer', (_, out) => void out.writeHead(503).end(busy));
  await startUpstream(proxy, 'producer');
  await startUpstream(proxy, 'consumer');
  const statuses = await Promise.all(Array.from({ length: 20 }, async () => (await post(proxy)).status));
  expect(statuses.filter((status) => status === 503)).toHaveLength(10);
  expect(reading.asked).toHaveLength(10);
});

test('an instance is drained and comes back by an admin’s word', async () => {
  const proxy = await startProxy();
  const one = await startUpstream(proxy, 'producer');
  const other = await startUpstream(proxy, 'producer');
  await startUpstream(proxy, 'consumer');
  const drain = (body: unknown, headers = {}) =>
    fetch(url(proxy, '/admin/drain'), { method: 'POST', body: JSON.stringify(body), headers });
  const page = { origin: 'https://elsewhere.example' };
  expect((await drain({ instance: one.httpAddress }, page)).status).toBe(400);
  expect(await (await drain({ instance: one.httpAddress })).json()).toEqual({
    instance: one.httpAddress,
    draining: true,
    requests_under_way: 0,
  });
  for (let i = 0; i < 3; i++) await post(proxy);
  expect([one.asked.length, other.asked.length]).toEqual([0, 3]);
  const { instances } = (await (await fetch(url(proxy, '/health'))).json()) as {
    instances: { draining: boolean }[];
  };
  expect(instances.map(({ draining }) => draining)).toEqual([true, false, false]);
  await drain({ instance: other.httpAddress });
  const none = await post(proxy);
  expect([none.status, await none.text()]).toEqual([503, expect.stringContaining('is being drained')]);
  await drain({ instance: other.httpAddress, drain: false });
  await drain({ instance: one.httpAddress, drain: false });
  for (let i = 0; i < 2; i++) await post(proxy);
  expect(one.asked.length).toBe(1);
  expect((await drain({ instance: '10.0.0.1:1' })).status).toBe(400);
  expect((await drain('all')).status).toBe(400);
});

test('a proxy that has drained all instances of a role is not ready', async () => {
  const proxy = await startProxy();
  const { httpAddress: instance } = await startUpstream(proxy, 'producer');
  await startUpstream(proxy, 'consumer');
  const statuses = async () => [(await fetch(url(proxy, '/ready'))).status, (await post(proxy)).status];
  const drain = (body: unknown) =>
    fetch(url(proxy, '/admin/drain'), { method: 'POST', body: JSON.stringify(body) });
  await drain({ instance });
  expect(await statuses()).toEqual([503, 503]);
  await drain({ instance, drain: false });
  expect(await statuses()).toEqual([200, 200]);
});

test('an instance that pings on while its HTTP server hangs is let alone', async () => {
  const proxy = await startProxy({ healthIntervalMs: 20 });
  const one = await startUpstream(proxy, 'producer');
  one.healthy = false;
  while ((await metric(proxy, 'pd_proxy_instances_ejected{role="producer"}')) !== 1);
  one.healthy = true;
  while ((await metric(proxy, 'pd_proxy_instances_ejected{role="producer"}')) !== 0);
});
