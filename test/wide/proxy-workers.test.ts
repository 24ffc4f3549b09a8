/** A proxy of several processes: one owns what all requests share, and each of the others may die without the rest. */
import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';
import type { ServerResponse } from 'node:http';
import { Agent, request } from 'undici';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { formatHostPort } from '../../src/net/address.ts';
import type { PdProxy } from '../../src/proxy/proxy.ts';
import { answerJson, FakeUpstream } from '../support/fake-upstream.ts';
import { OtlpReceiver } from '../support/otlp-receiver.ts';
import { startQuietProxy } from '../support/quiet-proxy.ts';

let proxy: PdProxy;
let producer: FakeUpstream;
let consumer: FakeUpstream;
let receiver: OtlpReceiver;
/** Answers to `stream` are the test's. */
const streams: ServerResponse[] = [];

beforeAll(async () => {
  receiver = await OtlpReceiver.start();
  proxy = await startQuietProxy({ workers: 2, otlpEndpoint: receiver.url });
  producer = await FakeUpstream.start('producer', answerJson());
  consumer = await FakeUpstream.start('consumer', async (asked, out) => {
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

const counted = async (series: RegExp) => {
  const text = await (await fetch(url('/metrics'))).text();
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

test('a process that is killed takes only its own requests with it, and another takes its place', async () => {
  const before = await completed();
  const [one, other] = await Promise.all([post({ stream: true }), post({ stream: true })]);
  const bodies = [one.body.text(), other.body.text()].map((text) =>
    text.then(
      () => 'whole',
      () => 'broken',
    ),
  );
  const victim = relayPids()[0]!;
  process.kill(victim, 'SIGKILL');
  expect(await Promise.race(bodies)).toBe('broken');
  for (const out of streams.splice(0)) out.end('data: [DONE]\n\n');
  expect((await Promise.all(bodies)).sort()).toEqual(['broken', 'whole']);
  while (relayPids().filter((pid) => pid !== victim).length < 2) await new Promise((r) => setImmediate(r));
  for (let i = 0; i < 4; i++) expect((await post({})).statusCode).toBe(200);
  expect(await completed()).toBeGreaterThanOrEqual(before + 5);
});

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
