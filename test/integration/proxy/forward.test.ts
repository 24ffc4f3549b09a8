import { once } from 'node:events';
import type { ServerResponse } from 'node:http';
import { describe, expect, test } from 'vitest';
import { formatHostPort } from '../../../src/net/address.ts';
import type { PdProxy } from '../../../src/proxy/proxy.ts';
import {
  type Answer,
  type Asked,
  answerJson,
  type FakeUpstream,
  sendPing,
} from '../../support/fake-upstream.ts';
import { startProxy, startUpstream, url } from '../../support/proxies.ts';
import { withStoppedClock } from '../../support/stopped-clock.ts';

/** For what announces itself by no event here. */
async function until(condition: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await condition())) await new Promise((resolve) => setImmediate(resolve));
}

function post(proxy: PdProxy, body: unknown, init: RequestInit & { path?: string } = {}): Promise<Response> {
  return fetch(url(proxy, init.path), {
    method: 'POST',
    headers: { 'content-type': 'application/json', authorization: 'Bearer key' },
    body: typeof body === 'string' ? body : JSON.stringify(body),
    ...init,
  });
}

const metric = async (proxy: PdProxy, line: string) =>
  (await (await fetch(url(proxy, '/metrics'))).text()).split('\n').some((l) => l === line);

const REQUEST = { model: 'm', prompt: 'Hello world', max_tokens: 10 };

describe('a request', () => {
  test.each([
    [
      '/v1/completions',
      { ...REQUEST, n: 2, logprobs: 3 },
      { model: 'm', prompt: 'Hello world', n: 1, max_tokens: 1 },
    ],
    [
      '/v1/chat/completions',
      { model: 'm', messages: [], max_completion_tokens: 9, stream: true, stream_options: {}, min_tokens: 2 },
      { model: 'm', messages: [], max_completion_tokens: 1, stream: false, max_tokens: 1 },
    ],
  ])(
    '%s: prefill copy to the producer, then the original to the consumer, with one id',
    async (path, body, copy) => {
      const proxy = await startProxy();
      const order: string[] = [];
      const say =
        (role: string): Answer =>
        (asked, out) => {
          order.push(role);
          return answerJson()(asked, out);
        };
      const producer = await startUpstream(proxy, 'producer', say('producer'));
      const consumer = await startUpstream(proxy, 'consumer', say('consumer'));
      const raw = ` ${JSON.stringify(body)}\n`;
      const response = await post(proxy, raw, { path });
      const answer = (await response.json()) as { id: string };

      expect(order).toEqual(['producer', 'consumer']);
      expect(producer.asked[0]).toMatchObject({ path, json: copy });
      expect(consumer.asked[0]).toMatchObject({ path, raw });
      const id = new RegExp(
        `^___prefill_addr_${producer.zmqAddress}___decode_addr_${consumer.zmqAddress}_[0-9a-f]{32}$`.replaceAll(
          '.',
          '\\.',
        ),
      );
      for (const { asked } of [producer, consumer]) {
        expect(asked[0]!.headers['x-request-id']).toMatch(id);
        expect(asked[0]!.headers['authorization']).toBe('Bearer key');
      }
      expect(consumer.asked[0]!.headers['x-request-id']).toBe(producer.asked[0]!.headers['x-request-id']);
      expect(response.headers.get('x-request-id')).toBe(producer.asked[0]!.headers['x-request-id']);
      expect(answer.id.slice('cmpl-'.length)).toMatch(id);
      expect(Object.keys(producer.asked[0]!.json).sort()).toEqual(Object.keys(copy).sort());
    },
  );

  test('over IPv6 carries bracketed addresses', async () => {
    const proxy = await startProxy({ host: '::1' });
    await startUpstream(proxy, 'producer', answerJson(), { host: '::1' });
    const consumer = await startUpstream(proxy, 'consumer', answerJson(), { host: '::1' });
    expect((await post(proxy, REQUEST)).status).toBe(200);
    expect(consumer.asked[0]!.headers['x-request-id']).toMatch(
      /^___prefill_addr_\[::1\]:\d+___decode_addr_\[::1\]:\d+_[0-9a-f]{32}$/,
    );
  });

  test('reaches the consumer only once the whole answer of the producer is there', async () => {
    const proxy = await startProxy();
    let finish!: () => void;
    const producer = await startUpstream(proxy, 'producer', (_asked, out) => {
      out.writeHead(200, { 'content-type': 'application/json' });
      out.write('{"id":');
      finish = () => out.end('"x"}');
    });
    const consumer = await startUpstream(proxy, 'consumer');
    const response = post(proxy, REQUEST);
    await once(producer.events, 'asked');
    await fetch(url(proxy, '/health')); // a whole round trip later
    expect(consumer.asked).toHaveLength(0);
    finish();
    expect((await response).status).toBe(200);
    expect(consumer.asked).toHaveLength(1);
  });
});

describe('errors', () => {
  test('of prefill reach the client with status and body, and the consumer is never asked', async () => {
    const proxy = await startProxy();
    const error = {
      error: {
        message: 'too long',
        type: 'invalid_request_error',
        param: 'prompt',
        code: 'CONTEXT_EXCEEDED',
      },
    };
    await startUpstream(proxy, 'producer', answerJson(422, error));
    const consumer = await startUpstream(proxy, 'consumer');
    const response = await post(proxy, { ...REQUEST, stream: true });
    expect(response.status).toBe(422);
    expect(response.headers.get('content-type')).toBe('application/json');
    expect(await response.json()).toMatchObject(error);
    expect(consumer.asked).toHaveLength(0);
  });

  test('of decode reach the client with status and body', async () => {
    const proxy = await startProxy();
    await startUpstream(proxy, 'producer');
    const consumer = await startUpstream(
      proxy,
      'consumer',
      answerJson(504, { error: { code: 'KV_LOAD_TIMEOUT' } }),
    );
    const response = await post(proxy, REQUEST);
    expect(response.status).toBe(504);
    expect(await response.json()).toMatchObject({ error: { code: 'KV_LOAD_TIMEOUT' } });
    expect(consumer.asked).toHaveLength(1); // an answer, if a bad one: not asked again
  });

  test('of the head alone are told before the body is read: methods that a path has not, bodies that are encoded', async () => {
    const proxy = await startProxy();
    const ask = async (method: string, path: string, headers: Record<string, string> = {}) => {
      const response = await fetch(url(proxy, path), {
        method,
        headers,
        ...(method === 'POST' && { body: 'x' }),
      });
      const { error } = JSON.parse((await response.text()) || '{}') as { error?: { code: string } };
      return [response.status, response.headers.get('allow'), error?.code];
    };
    expect(await ask('GET', '/v1/responses')).toEqual([405, 'POST', 'METHOD_NOT_ALLOWED']);
    expect(await ask('POST', '/v1/requests/1/route')).toEqual([405, 'GET, HEAD', 'METHOD_NOT_ALLOWED']);
    expect(await ask('HEAD', '/v1/models')).toEqual([200, null, undefined]);
    expect(await ask('POST', '/v1/embeddings')).toEqual([404, null, 'REQUEST_INVALID']);
    expect(await ask('GET', '/v1/models/50%')).toEqual([400, null, 'REQUEST_INVALID']);
    const long = await fetch(url(proxy, `/${'x'.repeat(10_000)}`));
    expect([long.status, (await long.text()).length < 500]).toEqual([404, true]);
    const encoded = { 'content-encoding': 'gzip' };
    expect(await ask('POST', '/v1/completions', encoded)).toEqual([415, null, 'BODY_ENCODED']);
    expect(await ask('GET', '/v1/responses?again')).toEqual([405, 'POST', 'METHOD_NOT_ALLOWED']);
    for (const line of [
      'pd_proxy_requests_total{route="/v1/responses",status="405"} 2',
      'pd_proxy_request_errors_total{route="/v1/responses",code="METHOD_NOT_ALLOWED"} 2',
      'pd_proxy_requests_total{route="/v1/completions",status="415"} 1',
      'pd_proxy_request_errors_total{route="/v1/completions",code="BODY_ENCODED"} 1',
    ])
      expect(await metric(proxy, line), line).toBe(true);
  });

  test('no instance of a role: 503 naming the role', async () => {
    const proxy = await startProxy();
    const nobody = await post(proxy, REQUEST);
    expect(nobody.status).toBe(503);
    expect(await nobody.json()).toMatchObject({
      error: { code: 'NO_INSTANCE', type: 'server_error', message: expect.stringContaining('no producer') },
    });
    await startUpstream(proxy, 'producer', answerJson(), { digest: 'a' });
    expect(await (await post(proxy, REQUEST)).json()).toMatchObject({
      error: { message: expect.stringContaining('no consumer') },
    });
    await startUpstream(proxy, 'consumer', answerJson(), { digest: 'b' });
    expect(await (await post(proxy, REQUEST)).json()).toMatchObject({
      error: { code: 'NO_INSTANCE', message: expect.stringContaining('fingerprints') },
    });
  });

  test.each([1, 2])(
    'instances that lead back to a proxy, %i in a ring: 400 that says so, not the same request without end',
    async (count) => {
      const proxies: PdProxy[] = [];
      for (let i = 0; i < count; i++) {
        const proxy = await startProxy();
        // Before others ask it which models it has.
        await startUpstream(proxy, 'consumer');
        proxies.push(proxy);
      }
      for (const [i, proxy] of proxies.entries()) {
        const http_address = formatHostPort(proxies[(i + 1) % count]!.httpAddress);
        await sendPing(proxy.discoveryAddress, { type: 'P', http_address, zmq_address: '127.0.0.1:1' });
        await until(() => proxy.instances.length === 2);
      }
      const response = await post(proxies[0]!, REQUEST);
      expect(response.status).toBe(400);
      expect(await response.json()).toMatchObject({
        error: { code: 'REQUEST_INVALID', message: expect.stringContaining('leads back') },
      });
    },
  );

  test.each(['{broken', '[1]', '"text"', ''])('a body that is no JSON object (%j): 400', async (body) => {
    const proxy = await startProxy();
    const response = await post(proxy, body);
    expect(response.status).toBe(400);
    expect(await response.json()).toMatchObject({
      error: { code: 'REQUEST_INVALID', type: 'invalid_request_error' },
    });
  });

  test('an unknown route is 404 in the same form', async () => {
    const proxy = await startProxy();
    const response = await fetch(url(proxy, '/v1/nothing'));
    expect(response.status).toBe(404);
    expect(await response.json()).toMatchObject({
      error: { message: expect.stringContaining('/v1/nothing') },
    });
  });

  test('a producer that does not answer in time: 504 naming it and the option', async () => {
    const proxy = await startProxy({ prefillTimeoutMs: 10_000 });
    const producer = await startUpstream(proxy, 'producer', () => {});
    await startUpstream(proxy, 'consumer');
    await withStoppedClock(async (clock) => {
      const [asked, aborted] = [once(producer.events, 'asked'), once(producer.events, 'aborted')];
      const answer = post(proxy, REQUEST);
      await asked;
      clock.passes(10_000);
      const response = await answer;
      expect(response.status).toBe(504);
      const { error } = (await response.json()) as { error: { message: string; code: string } };
      expect(error.code).toBe('UPSTREAM_TIMEOUT');
      expect(error.message).toContain(producer.label);
      expect(error.message).toContain('--prefill-timeout');
      await aborted;
    });
  });
});

describe('an instance that does not take the request', () => {
  test.each(['producer', 'consumer'] as const)(
    '%s: a new pair, a new id, prefill again, once',
    async (dead) => {
      const proxy = await startProxy();
      const victim = await startUpstream(proxy, dead);
      const others = [await startUpstream(proxy, 'producer'), await startUpstream(proxy, 'consumer')];
      await victim.kill();
      const response = await post(proxy, REQUEST);
      expect(response.status).toBe(200);
      const { id } = (await response.json()) as { id: string };
      for (const other of others) expect(id).toContain(other.zmqAddress);
      const [producer, consumer] = others as [FakeUpstream, FakeUpstream];
      // With a dead consumer the producer ran twice, each time under another id.
      const ids = producer.asked.map((asked) => asked.headers['x-request-id']);
      expect(new Set(ids).size).toBe(dead === 'consumer' ? 2 : 1);
      expect(consumer.asked[0]!.headers['x-request-id']).toBe(ids.at(-1));
      expect(await metric(proxy, 'pd_proxy_pairs_replaced_total 1')).toBe(true);
      // It is left aside from now on.
      expect((await post(proxy, REQUEST)).status).toBe(200);
      expect(await metric(proxy, 'pd_proxy_pairs_replaced_total 1')).toBe(true);
    },
  );

  test('and has no substitute: 502 naming it', async () => {
    const proxy = await startProxy();
    await startUpstream(proxy, 'producer');
    const consumer = await startUpstream(proxy, 'consumer');
    await consumer.kill();
    const response = await post(proxy, REQUEST);
    expect(response.status).toBe(502);
    expect(response.headers.get('x-request-id')).toContain(consumer.zmqAddress);
    expect(await response.json()).toMatchObject({
      error: { code: 'UPSTREAM_FAILED', message: expect.stringContaining(consumer.label) },
    });
  });

  test('and whose substitutes refuse too: 502, once each has been tried', async () => {
    const proxy = await startProxy();
    const producer = await startUpstream(proxy, 'producer');
    const dead = [
      await startUpstream(proxy, 'consumer'),
      await startUpstream(proxy, 'consumer'),
      await startUpstream(proxy, 'consumer'),
    ];
    for (const consumer of dead) await consumer.kill();
    expect((await post(proxy, REQUEST)).status).toBe(502);
    expect(producer.asked).toHaveLength(3);
  });

  test('because it is stopping counts as refused', async () => {
    const proxy = await startProxy();
    const draining = answerJson(503, { error: { code: 'SERVER_DRAINING', message: 'stopping' } });
    const leaving = await startUpstream(proxy, 'consumer', draining);
    await startUpstream(proxy, 'producer');
    const staying = await startUpstream(proxy, 'consumer');
    for (let i = 0; i < 3; i++) expect((await post(proxy, REQUEST)).status).toBe(200);
    expect(leaving.asked).toHaveLength(1);
    expect(staying.asked).toHaveLength(3);
  });
});

const EVENT = (text: string) => `data: {"choices":[{"text":${JSON.stringify(text)}}]}\n\n`;

/** A consumer whose stream the test writes. */
function streaming(): { answer: Answer; stream: Promise<ServerResponse> } {
  let resolve!: (out: ServerResponse) => void;
  const stream = new Promise<ServerResponse>((r) => {
    resolve = r;
  });
  const answer = (_asked: Asked, out: ServerResponse) => {
    out.writeHead(200, { 'content-type': 'text/event-stream; charset=utf-8', 'x-own': 'kept' });
    out.flushHeaders();
    resolve(out);
  };
  return { answer, stream };
}

describe('a stream', () => {
  test('passes at once, chunk by chunk, with the head before the first', async () => {
    const proxy = await startProxy();
    await startUpstream(proxy, 'producer');
    const { answer, stream } = streaming();
    await startUpstream(proxy, 'consumer', answer);
    const response = await post(proxy, { ...REQUEST, stream: true }); // the head is here while nothing has been written
    expect(response.headers.get('content-type')).toContain('text/event-stream');
    expect(response.headers.get('x-own')).toBe('kept');
    const reader = response.body!.getReader();
    const out = await stream;
    for (const text of ['one', 'two', '🐉']) {
      out.write(EVENT(text));
      expect(Buffer.from((await reader.read()).value!).toString()).toBe(EVENT(text)); // before the next is written
    }
    out.end('data: [DONE]\n\n');
    expect(Buffer.from((await reader.read()).value!).toString()).toBe('data: [DONE]\n\n');
    expect((await reader.read()).done).toBe(true);
    await until(() => metric(proxy, 'pd_proxy_time_to_first_token_seconds_count 1'));
  });

  test('whose consumer dies ends with an error event, whole events before it', async () => {
    const proxy = await startProxy();
    await startUpstream(proxy, 'producer');
    const { answer, stream } = streaming();
    const consumer = await startUpstream(proxy, 'consumer', answer);
    const response = await post(proxy, { ...REQUEST, stream: true });
    const out = await stream;
    out.write(EVENT('one'));
    out.write('data: {"choices":[{"te'); // half an event
    const reader = response.body!.getReader();
    let text = Buffer.from((await reader.read()).value!).toString();
    await consumer.kill();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      text += Buffer.from(part.value).toString();
    }
    const events = text.split('\n\n').filter(Boolean);
    expect(events[0]).toBe(EVENT('one').trim());
    expect(JSON.parse(events[1]!.slice('data: '.length))).toMatchObject({
      error: { code: 'UPSTREAM_FAILED', message: expect.stringContaining(consumer.label) },
    });
    expect(events[2]).toBe('data: [DONE]');
  });

  test('of responses whose consumer dies ends as streams of responses do, numbered on', async () => {
    const proxy = await startProxy();
    await startUpstream(proxy, 'producer');
    const { answer, stream } = streaming();
    const consumer = await startUpstream(proxy, 'consumer', answer);
    const response = await post(proxy, { model: 'm', input: 'Hi', stream: true }, { path: '/v1/responses' });
    const out = await stream;
    const item = { type: 'reasoning', id: 'rs_1' };
    const written = [
      {
        type: 'response.created',
        response: { id: 'resp_1', status: 'in_progress', error: null, output: [] },
      },
      { type: 'response.output_item.done', item },
    ].map((data, i) => `event: ${data.type}\ndata: ${JSON.stringify({ ...data, sequence_number: i })}\n\n`);
    out.write(written.join(''));
    out.write('event: response.output_te'); // half an event
    const reader = response.body!.getReader();
    let text = Buffer.from((await reader.read()).value!).toString();
    await consumer.kill();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      text += Buffer.from(part.value).toString();
    }
    const message = expect.stringContaining(consumer.label);
    expect(text.startsWith(written.join(''))).toBe(true);
    const ends = text
      .slice(written.join('').length)
      .match(/^event: error\ndata: (.*)\n\nevent: response.failed\ndata: (.*)\n\n$/);
    expect(JSON.parse(ends![1]!)).toEqual({
      ...{ type: 'error', sequence_number: 2, code: 'UPSTREAM_FAILED', message, param: null },
    });
    expect(JSON.parse(ends![2]!)).toMatchObject({
      ...{ type: 'response.failed', sequence_number: 3 },
      response: { id: 'resp_1', status: 'failed', error: { code: 'server_error', message }, output: [item] },
    });
  });

  test('that stalls ends with an error event at the deadline', async () => {
    const proxy = await startProxy({ decodeIdleTimeoutMs: 10_000 });
    await startUpstream(proxy, 'producer');
    const { answer, stream } = streaming();
    const consumer = await startUpstream(proxy, 'consumer', answer);
    await withStoppedClock(async (clock) => {
      const aborted = once(consumer.events, 'aborted');
      const response = await post(proxy, { ...REQUEST, stream: true });
      (await stream).write(EVENT('one'));
      const text = response.text();
      await clock.passesUntil(text);
      expect(await text).toContain('--decode-idle-timeout');
      await aborted;
    });
  });

  test('that the client leaves is aborted at the consumer', async () => {
    const proxy = await startProxy();
    await startUpstream(proxy, 'producer');
    const { answer, stream } = streaming();
    const consumer = await startUpstream(proxy, 'consumer', answer);
    const aborted = once(consumer.events, 'aborted');
    const client = new AbortController();
    const response = await post(proxy, { ...REQUEST, stream: true }, { signal: client.signal });
    (await stream).write(EVENT('one'));
    await response.body!.getReader().read();
    client.abort();
    await aborted;
    await until(() => metric(proxy, 'pd_proxy_requests_total{route="/v1/completions",status="499"} 1'));
    await until(() => metric(proxy, 'pd_proxy_requests_in_flight 0'));
  });

  test('of a client that reads slowly holds the consumer back', async () => {
    const proxy = await startProxy();
    await startUpstream(proxy, 'producer');
    const { answer, stream } = streaming();
    await startUpstream(proxy, 'consumer', answer);
    const response = await post(proxy, { ...REQUEST, stream: true });
    const out = await stream;
    const event = EVENT('x'.repeat(60_000));
    let written = 0;
    while (out.write(event) || (await drained(out))) written++; // nobody reads: it must stop by itself
    expect(written * event.length).toBeLessThan(64 * 1024 * 1024);
    out.end();
    expect((await response.text()).length).toBe((written + 1) * event.length);
  });
});

/** False where it stays full for a while. */
async function drained(out: ServerResponse): Promise<boolean> {
  const timer = AbortSignal.timeout(300);
  return await once(out, 'drain', { signal: timer }).then(
    () => true,
    () => false,
  );
}

test('a client that leaves during prefill: the producer is aborted and the consumer never asked', async () => {
  const proxy = await startProxy();
  const producer = await startUpstream(proxy, 'producer', () => {});
  const consumer = await startUpstream(proxy, 'consumer');
  const client = new AbortController();
  const response = post(proxy, REQUEST, { signal: client.signal });
  const aborted = once(producer.events, 'aborted');
  await once(producer.events, 'asked');
  client.abort();
  await expect(response).rejects.toThrow();
  await aborted;
  await until(() => metric(proxy, 'pd_proxy_requests_in_flight 0'));
  expect(consumer.asked).toHaveLength(0);
});

test('a consumer that dies in the middle of a plain answer: 502', async () => {
  const proxy = await startProxy();
  await startUpstream(proxy, 'producer');
  const consumer = await startUpstream(proxy, 'consumer', (_asked, out) => {
    out.writeHead(200, { 'content-type': 'application/json' });
    out.write('{"id":"cmpl-');
    setImmediate(() => out.destroy());
  });
  const response = await post(proxy, REQUEST);
  expect(response.status).toBe(502);
  expect(await response.json()).toMatchObject({
    error: { code: 'UPSTREAM_FAILED', message: expect.stringContaining(consumer.label) },
  });
});

describe('what the proxy says about itself', () => {
  test('/health lists instances; /v1/models is the union over consumers', async () => {
    const proxy = await startProxy();
    const producer = await startUpstream(proxy, 'producer', answerJson(), { models: ['a'], digest: 'abc' });
    const consumer = await startUpstream(proxy, 'consumer', answerJson(), { models: ['a', 'b'] });
    await startUpstream(proxy, 'consumer', answerJson(), { models: ['b', 'c'] });
    const models = (await (await fetch(url(proxy, '/v1/models'))).json()) as { data: { id: string }[] };
    expect(models).toMatchObject({ object: 'list' });
    expect(models.data.map((model) => model.id)).toEqual(['a', 'b', 'c']);
    expect(await (await fetch(url(proxy, '/v1/models/c'))).json()).toEqual(models.data[2]);
    const unknown = await fetch(url(proxy, '/v1/models/org%2Fd'));
    expect([unknown.status, await unknown.json()]).toMatchObject([
      404,
      { error: { message: expect.stringContaining('"org/d"'), param: 'model', code: 'model_not_found' } },
    ]);
    const health = await (await fetch(url(proxy, '/health'))).json();
    expect(health).toMatchObject({
      status: 'ok',
      counts: { producer: 1, consumer: 2 },
      instances: [
        {
          role: 'producer',
          http_address: producer.httpAddress,
          zmq_address: producer.zmqAddress,
          fingerprint: 'abc',
          model: 'model-abc',
          age_seconds: expect.any(Number),
        },
        { role: 'consumer', http_address: consumer.httpAddress, fingerprint: null },
        { role: 'consumer' },
      ],
    });
  });

  test('/v1/models does not wait for an instance that hangs', async () => {
    const proxy = await startProxy();
    await startUpstream(proxy, 'consumer', answerJson(), { models: ['a'] });
    await sendPing(proxy.discoveryAddress, {
      type: 'D',
      http_address: '127.0.0.1:1', // nobody
      zmq_address: '127.0.0.1:2',
    });
    await until(() => proxy.instances.length === 2);
    const models = (await (await fetch(url(proxy, '/v1/models'))).json()) as { data: unknown[] };
    expect(models.data).toHaveLength(1);
  });

  test("/openapi.json is a consumer's", async () => {
    const proxy = await startProxy();
    const ask = async () => {
      const response = await fetch(url(proxy, '/openapi.json'));
      return [response.status, await response.json()];
    };
    expect(await ask()).toMatchObject([503, { error: { code: 'NO_INSTANCE' } }]);
    await startUpstream(proxy, 'consumer');
    expect(await ask()).toEqual([200, { openapi: '3.1.0' }]);
  });

  test('bad pings are counted', async () => {
    const proxy = await startProxy();
    await sendPing(proxy.discoveryAddress, { type: 'P', http_address: 'x', zmq_address: 'y' });
    await until(() => metric(proxy, 'pd_proxy_bad_pings_total 1'));
  });
});

test('close lets requests under way end, and takes no new ones', async () => {
  const proxy = await startProxy();
  await startUpstream(proxy, 'producer');
  const { answer, stream } = streaming();
  await startUpstream(proxy, 'consumer', answer);
  const response = await post(proxy, { ...REQUEST, stream: true });
  const out = await stream;
  const closed = proxy.close(60_000);
  const refused = await post(proxy, REQUEST);
  expect(refused.status).toBe(503);
  expect(await refused.json()).toMatchObject({ error: { code: 'SERVER_DRAINING' } });
  // By which its client may ask what became of it, as of any other.
  const id = refused.headers.get('x-pd-request-id');
  const receipt = await fetch(url(proxy, `/v1/requests/${id}/route`));
  expect(await receipt.json()).toMatchObject({ id, status: 503, error: 'SERVER_DRAINING', attempts: [] });
  const counted = 'pd_proxy_request_errors_total{route="/v1/completions",code="SERVER_DRAINING"} 1';
  expect(await metric(proxy, counted)).toBe(true);
  out.end(EVENT('late'));
  expect(await response.text()).toBe(EVENT('late'));
  await closed;
  await expect(post(proxy, REQUEST)).rejects.toThrow();
});

test('close breaks what does not end in time', async () => {
  const proxy = await startProxy();
  await startUpstream(proxy, 'producer');
  const { answer, stream } = streaming();
  const consumer = await startUpstream(proxy, 'consumer', answer);
  const aborted = once(consumer.events, 'aborted');
  const response = await post(proxy, { ...REQUEST, stream: true });
  (await stream).write(EVENT('one'));
  const [text] = await Promise.all([response.text(), proxy.close(50), aborted]);
  expect(text).toContain('SERVER_DRAINING');
});
