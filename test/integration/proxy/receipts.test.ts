/** Receipts: where a request went, why, and who may read that. What workers of ours add to one is in test/e2e/native.test.ts. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import type { PdProxy } from '../../../src/proxy/proxy.ts';
import type { Answer } from '../../support/fake-upstream.ts';
import { startProxy, startUpstream, url } from '../../support/proxies.ts';
import { sharedTempDir } from '../../support/temp-dir.ts';

const DIR = sharedTempDir();

const post = (proxy: PdProxy, body: object = {}, headers: Record<string, string> = {}) =>
  fetch(url(proxy, '/v1/completions'), {
    method: 'POST',
    headers,
    body: JSON.stringify({ model: 'm', prompt: 'Hello', ...body }),
  });
const routeOf = async (proxy: PdProxy, id: string, headers: Record<string, string> = {}) => {
  const answer = await fetch(url(proxy, `/v1/requests/${encodeURIComponent(id)}/route`), { headers });
  return { status: answer.status, json: (await answer.json()) as Record<string, unknown> };
};

const stream: Answer = (_asked, out) => {
  out.writeHead(200, { 'content-type': 'text/event-stream' });
  out.end('data: {"choices":[]}\n\ndata: [DONE]\n\n');
};

test('a streamed answer: the pair, what it was chosen among, and the time of each stage', async () => {
  const proxy = await startProxy({ policy: 'least-loaded' });
  const producer = await startUpstream(proxy, 'producer');
  const others = [
    await startUpstream(proxy, 'consumer', stream),
    await startUpstream(proxy, 'consumer', stream),
  ];
  const answer = await post(proxy, { stream: true, prompt: [1, 2, 3] });
  await answer.text();
  const id = answer.headers.get('x-pd-request-id')!;
  const requestId = answer.headers.get('x-request-id')!;
  expect(id).toMatch(/^[0-9a-f]{32}$/);
  const { status, json } = await routeOf(proxy, id);
  expect(status).toBe(200);
  const consumers = others.map(({ httpAddress }) => ({
    http_address: httpAddress,
    cost_ms: expect.any(Number),
    cached_tokens: null,
  }));
  const time = expect.any(Number);
  expect(json).toMatchObject({
    id,
    route: '/v1/completions',
    model: 'm',
    key: null,
    status: 200,
    error: null,
    prompt: { prompts: 1, tokens: 3, counted: true },
    ms: { read: time, queue: time, placement: time, total: time },
    attempts: [
      {
        request_id: requestId,
        producer: { http_address: producer.httpAddress, policy: 'least-loaded', considered: 1, worker: null },
        consumer: { considered: 2, candidates: expect.arrayContaining(consumers) },
        alone: false,
        asked_early: false,
        wire: 'frozen',
        outcome: 'answered',
        at_ms: { prefill: time, prefilled: time, decode: time, answered: time, first_event: time, end: time },
        ms: { prefill: time, hand_over: time, decode: time },
      },
    ],
  });
  // Any id of the request finds it, such as that of the answer's body.
  expect((await routeOf(proxy, `cmpl-${requestId}-0`)).json).toEqual(json);
});

test('a pair that did not take it comes before the one that did, with why', async () => {
  const proxy = await startProxy();
  const producer = await startUpstream(proxy, 'producer');
  const [dead, alive] = [await startUpstream(proxy, 'consumer'), await startUpstream(proxy, 'consumer')];
  await dead.kill();
  const answers = [await post(proxy), await post(proxy)];
  const routes = await Promise.all(
    answers.map(async ({ headers }) => (await routeOf(proxy, headers.get('x-pd-request-id')!)).json),
  );
  const tried = routes.find((route) => (route['attempts'] as unknown[]).length === 2);
  expect(tried).toMatchObject({
    status: 200,
    attempts: [
      {
        consumer: { http_address: dead.httpAddress },
        outcome: 'refused',
        refused_by: 'consumer',
        reason: expect.stringContaining(dead.label),
      },
      {
        producer: { http_address: producer.httpAddress },
        consumer: { http_address: alive.httpAddress },
        outcome: 'answered',
      },
    ],
  });
});

test('what came to no pair has a receipt too', async () => {
  const proxy = await startProxy();
  const answer = await post(proxy);
  expect(answer.status).toBe(503);
  const { json } = await routeOf(proxy, answer.headers.get('x-pd-request-id')!);
  expect(json).toMatchObject({ status: 503, error: 'NO_INSTANCE', attempts: [] });
});

test('with keys it is for the holder of that of the request, and for admins', async () => {
  const keys = join(DIR, 'keys');
  writeFileSync(
    keys,
    'one sk-one-0123456789abcdef\ntwo sk-two-0123456789abcdef\nops sk-ops-0123456789abcdef admin\n',
  );
  const proxy = await startProxy({ access: { apiKeyFile: keys } });
  const bearer = (name: string) => ({ authorization: `Bearer sk-${name}-0123456789abcdef` });
  const answer = await post(proxy, {}, bearer('one'));
  const id = answer.headers.get('x-pd-request-id')!;
  expect(await routeOf(proxy, id, bearer('one'))).toMatchObject({ status: 200, json: { key: 'one' } });
  expect((await routeOf(proxy, id, bearer('ops'))).status).toBe(200);
  expect((await routeOf(proxy, id)).status).toBe(401);
  const others = await routeOf(proxy, id, bearer('two'));
  const unknown = await routeOf(proxy, '0'.repeat(32), bearer('two'));
  expect(others.status).toBe(404);
  expect(others).toEqual(unknown);
});
