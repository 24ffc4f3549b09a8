/** Producer and consumer asked at once: in every order in which they may answer or fail, one answer and nothing left under way. */
import { once } from 'node:events';
import type { ServerResponse } from 'node:http';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { formatHostPort } from '../../../src/net/address.ts';
import type { PdProxy } from '../../../src/proxy/proxy.ts';
import type { SendType } from '../../../src/wire/messages.ts';
import { OVERLAP_FEATURE } from '../../../src/wire/overlap.ts';
import { type Answer, type Asked, answerJson, FakeUpstream } from '../../support/fake-upstream.ts';
import { startQuietProxy } from '../../support/quiet-proxy.ts';
import { withStoppedClock } from '../../support/stopped-clock.ts';

const closing: (() => Promise<unknown>)[] = [];
const unhandled: unknown[] = [];
const onUnhandled = (error: unknown) => void unhandled.push(error);
beforeEach(() => void process.on('unhandledRejection', onUnhandled));
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
  process.off('unhandledRejection', onUnhandled);
  expect(unhandled.splice(0)).toEqual([]);
});

const REQUEST = { model: 'm', prompt: 'Hello world', max_tokens: 10 };
const DRAINING = answerJson(503, { error: { code: 'SERVER_DRAINING', message: 'stopping' } });

async function startProxy(settings?: Parameters<typeof startQuietProxy>[0]): Promise<PdProxy> {
  const proxy = await startQuietProxy(settings);
  closing.push(() => proxy.close(0));
  return proxy;
}

/** An instance whose answers to requests the test writes, one by one; releases and notices it takes by itself. */
class Scripted {
  readonly upstream: FakeUpstream;
  readonly #outs: ServerResponse[];

  private constructor(upstream: FakeUpstream, outs: ServerResponse[]) {
    this.upstream = upstream;
    this.#outs = outs;
  }

  static async start(
    proxy: PdProxy,
    role: 'producer' | 'consumer',
    {
      features = [OVERLAP_FEATURE],
      sendType,
      answer,
    }: { features?: readonly string[]; sendType?: SendType; answer?: Answer } = {},
  ): Promise<Scripted> {
    const outs: ServerResponse[] = [];
    const upstream = await FakeUpstream.start(role, (asked, out) => {
      if (asked.path.startsWith('/kv/')) return void out.end('{}');
      outs.push(out);
      return answer?.(asked, out);
    });
    closing.push(() => upstream.kill());
    await upstream.ping(proxy.discoveryAddress, 'd', features, { ...(sendType && { sendType }) });
    while (!proxy.instances.some((known) => known.httpAddress === upstream.httpAddress)) {
      await new Promise((resolve) => setImmediate(resolve));
    }
    return new Scripted(upstream, outs);
  }

  /** Requests it was asked to compute, in order. */
  get requests(): Asked[] {
    return this.upstream.asked.filter(({ path }) => !path.startsWith('/kv/'));
  }

  told(path: string): Asked[] {
    return this.upstream.asked.filter((asked) => asked.path === path);
  }

  /** The answer to its nth request, once that has come. */
  async asked(n = 0): Promise<ServerResponse> {
    while (!this.#outs[n]) await this.#event();
    return this.#outs[n];
  }

  /** Resolves once it has been asked under this id: at which place among its requests. */
  async untilAskedAs(id: ReturnType<typeof idOf>): Promise<number> {
    for (;;) {
      const at = this.requests.findIndex((asked) => idOf(asked) === id);
      if (at >= 0) return at;
      await this.#event();
    }
  }

  async answer(status = 200, extra: Record<string, unknown> = {}): Promise<void> {
    const out = await this.asked();
    await answerJson(status, extra)(this.requests[0]!, out);
  }

  /** Resolves once it has been told so, for the nth time. */
  async untilTold(path: string, times = 1): Promise<Asked> {
    for (;;) {
      const found = this.told(path)[times - 1];
      if (found) return found;
      await this.#event();
    }
  }

  /** Resolves once its nth request has been broken off. */
  async untilAborted(n = 0): Promise<void> {
    const out = await this.asked(n);
    while (!out.destroyed || out.writableFinished) await this.#event('aborted');
  }

  async #event(name = 'asked'): Promise<void> {
    await once(this.upstream.events, name, { signal: AbortSignal.timeout(60_000) });
  }
}

async function pair(settings: Parameters<typeof startProxy>[0] = {}) {
  const proxy = await startProxy(settings);
  const producer = await Scripted.start(proxy, 'producer');
  const consumer = await Scripted.start(proxy, 'consumer');
  return { proxy, producer, consumer };
}

const url = (proxy: PdProxy, path = '/v1/completions') =>
  `http://${formatHostPort(proxy.httpAddress)}${path}`;

function post(proxy: PdProxy, body: object = REQUEST, signal?: AbortSignal): Promise<Response> {
  return fetch(url(proxy), {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'x-pd-prefill-within': '1' },
    body: JSON.stringify(body),
    ...(signal && { signal }),
  });
}

async function counts(proxy: PdProxy, line: string): Promise<boolean> {
  return (await (await fetch(url(proxy, '/metrics'))).text()).split('\n').includes(line);
}

/** Every request of the proxy is over: nothing waits for anything. */
async function untilIdle(proxy: PdProxy): Promise<void> {
  while (!(await counts(proxy, 'pd_proxy_requests_in_flight 0'))) {
    await new Promise((resolve) => setImmediate(resolve));
  }
}

const idOf = (asked: Asked) => asked.headers['x-request-id'];

describe('where both know how', () => {
  test('the consumer is asked while the producer is at work, and told for how long that may go on', async () => {
    const { proxy, producer, consumer } = await pair({ prefillTimeoutMs: 80_000 });
    const response = post(proxy);
    await Promise.all([producer.asked(), consumer.asked()]);
    expect(producer.requests[0]!.json['max_tokens']).toBe(1);
    expect(producer.requests[0]!.headers['x-pd-prefill-within']).toBeUndefined();
    expect(consumer.requests[0]!.json).toEqual(REQUEST);
    expect(consumer.requests[0]!.headers['x-pd-prefill-within']).toBe('80000');
    expect(idOf(consumer.requests[0]!)).toBe(idOf(producer.requests[0]!));
    await producer.answer();
    await consumer.answer(200, { text: 'good' });
    expect(await (await response).json()).toMatchObject({ text: 'good' });
    expect(await counts(proxy, 'pd_proxy_overlapped_total 1')).toBe(true);
    expect(producer.told('/kv/release')).toEqual([]);
  });

  test('a stream is not held up by a producer that answers late, nor ended by one that fails then', async () => {
    const { proxy, producer, consumer } = await pair();
    const response = post(proxy, { ...REQUEST, stream: true });
    const prefill = await producer.asked();
    const out = await consumer.asked();
    out.writeHead(200, { 'content-type': 'text/event-stream' });
    out.write('data: {"choices":[{"text":"one"}]}\n\n');
    const reader = (await response).body!.getReader();
    expect(Buffer.from((await reader.read()).value!).toString()).toContain('one');
    prefill.destroy();
    out.end('data: [DONE]\n\n');
    expect(Buffer.from((await reader.read()).value!).toString()).toBe('data: [DONE]\n\n');
    await untilIdle(proxy);
    expect(await counts(proxy, 'pd_proxy_pairs_replaced_total 0')).toBe(true);
  });

  test('a consumer that still waits when the prompt is computed is told so', async () => {
    const { proxy, producer, consumer } = await pair();
    const response = post(proxy);
    await consumer.asked();
    await producer.answer();
    const { json } = await consumer.untilTold('/kv/prefilled');
    expect(json).toEqual({
      request_id: idOf(consumer.requests[0]!),
      route: '/v1/completions',
      prompts: 1,
    });
    await consumer.answer();
    expect((await response).status).toBe(200);
  });

  test('and told again while it waits, for it may have missed it', async () => {
    const { proxy, producer, consumer } = await pair();
    const response = post(proxy);
    await consumer.asked();
    await producer.answer();
    await consumer.untilTold('/kv/prefilled', 2);
    const [first, second] = consumer.told('/kv/prefilled');
    expect(second!.json).toEqual(first!.json);
    await consumer.answer();
    expect((await response).status).toBe(200);
  });

  test('the time for decode counts from the end of prefill', async () => {
    const { proxy, producer, consumer } = await pair({ decodeIdleTimeoutMs: 10_000 });
    await withStoppedClock(async (clock) => {
      const response = post(proxy);
      await Promise.all([producer.asked(), consumer.asked()]);
      clock.passes(20_000); // longer than the consumer may take by itself
      await fetch(url(proxy, '/health')); // a whole round trip later
      expect([consumer.requests.length, (await consumer.asked()).destroyed]).toEqual([1, false]);
      await producer.answer();
      await clock.passesUntil(response);
      const { error } = (await (await response).json()) as { error: { message: string; code: string } };
      expect(error).toMatchObject({
        code: 'UPSTREAM_TIMEOUT',
        message: expect.stringContaining('--decode-idle-timeout'),
      });
      await consumer.untilAborted();
    });
  });
});

describe('in turn all the same', () => {
  test.each([
    ['an end that does not know how', {}, [], REQUEST],
    ['--overlap 0', { overlap: 0 }, [OVERLAP_FEATURE], REQUEST],
    ['several prompts', {}, [OVERLAP_FEATURE], { ...REQUEST, prompt: ['a', 'b'] }],
    ['GET without the native hand-over', {}, [OVERLAP_FEATURE], REQUEST, 'GET'],
  ] as const)('%s', async (_, settings, features, body, sendType?: SendType) => {
    const proxy = await startProxy(settings);
    const ends = sendType ? { sendType } : {};
    const producer = await Scripted.start(proxy, 'producer', { features, ...ends });
    const consumer = await Scripted.start(proxy, 'consumer', { answer: answerJson(), ...ends });
    const response = post(proxy, body);
    await producer.asked();
    await fetch(url(proxy, '/health')); // a whole round trip later
    expect(consumer.requests).toHaveLength(0);
    await producer.answer();
    expect((await response).status).toBe(200);
    expect(consumer.requests[0]!.headers['x-pd-prefill-within']).toBeUndefined();
  });

  test('what comes while the producer has enough to do', async () => {
    const proxy = await startProxy({ overlap: 1 });
    const producer = await Scripted.start(proxy, 'producer');
    const consumer = await Scripted.start(proxy, 'consumer', { answer: answerJson() });
    const first = post(proxy);
    await Promise.all([producer.asked(0), consumer.asked(0)]);
    const second = post(proxy);
    const prefill = await producer.asked(1);
    await fetch(url(proxy, '/health'));
    expect(consumer.requests).toHaveLength(1);
    prefill.end('{}');
    expect((await second).status).toBe(200);
    await producer.answer();
    expect((await first).status).toBe(200);
    await untilIdle(proxy);
    // Nothing of them is counted any more.
    const third = post(proxy);
    await Promise.all([producer.asked(2), consumer.asked(2)]);
    (await producer.asked(2)).end('{}');
    expect((await third).status).toBe(200);
  });
});

describe('a producer', () => {
  test.each(['refuses', 'drains'] as const)(
    'that %s: the consumer is given up, another pair takes it',
    async (how) => {
      const proxy = await startProxy();
      const victim = await Scripted.start(proxy, 'producer', how === 'drains' ? { answer: DRAINING } : {});
      const producer = await Scripted.start(proxy, 'producer', { answer: answerJson() });
      const consumer = await Scripted.start(proxy, 'consumer');
      if (how === 'refuses') await victim.upstream.kill();
      const response = post(proxy);
      await producer.asked();
      const second = idOf(producer.requests[0]!);
      const at = await consumer.untilAskedAs(second);
      // Given up as soon as the first producer refuses, its request may never have come so far as to be read.
      const first = at > 0 ? idOf(consumer.requests[0]!) : undefined;
      if (first !== undefined) await consumer.untilAborted(0);
      await answerJson(200, { text: 'good' })(consumer.requests[at]!, await consumer.asked(at));
      expect(await (await response).json()).toMatchObject({ text: 'good' });
      const released = (await consumer.untilTold('/kv/release')).json['request_id'];
      expect(released).toBe(first ?? released);
      expect(released).not.toBe(second);
      expect(await counts(proxy, 'pd_proxy_pairs_replaced_total 1')).toBe(true);
    },
  );

  test("that answers an error: it is the client's, the consumer is given up", async () => {
    const { proxy, producer, consumer } = await pair();
    const response = post(proxy);
    await consumer.asked();
    await producer.answer(422, { error: { code: 'CONTEXT_EXCEEDED' } });
    expect((await response).status).toBe(422);
    expect(await (await response).json()).toMatchObject({ error: { code: 'CONTEXT_EXCEEDED' } });
    await consumer.untilAborted();
    await consumer.untilTold('/kv/release');
  });

  test('that does not answer in time: 504, the consumer is given up', async () => {
    const { proxy, producer, consumer } = await pair({ prefillTimeoutMs: 10_000 });
    await withStoppedClock(async (clock) => {
      const answer = post(proxy);
      await Promise.all([producer.asked(), consumer.asked()]);
      clock.passes(10_000);
      const response = await answer;
      expect(response.status).toBe(504);
      expect(await response.text()).toContain('--prefill-timeout');
      await Promise.all([producer.untilAborted(), consumer.untilAborted()]);
      await consumer.untilTold('/kv/release');
      await untilIdle(proxy);
    });
  });
});

describe('a consumer', () => {
  test.each(['refuses', 'drains'] as const)(
    'that %s: the prefill is given up, another pair takes it',
    async (how) => {
      const proxy = await startProxy();
      const victim = await Scripted.start(proxy, 'consumer', how === 'drains' ? { answer: DRAINING } : {});
      const consumer = await Scripted.start(proxy, 'consumer', { answer: answerJson(200, { text: 'good' }) });
      const producer = await Scripted.start(proxy, 'producer');
      if (how === 'refuses') await victim.upstream.kill();
      const response = post(proxy);
      // The substitute answers at once, so that this needs no end of the second prefill.
      expect(await (await response).json()).toMatchObject({ text: 'good' });
      const second = idOf(consumer.requests[0]!);
      const at = await producer.untilAskedAs(second);
      // As above.
      const first = at > 0 ? idOf(producer.requests[0]!) : undefined;
      if (first !== undefined) await producer.untilAborted(0);
      (await producer.asked(at)).end('{}');
      const released = (await producer.untilTold('/kv/release')).json['request_id'];
      expect(released).toBe(first ?? released);
      expect(released).not.toBe(second);
      await untilIdle(proxy);
    },
  );

  test('that finds fault with the request: its answer at once, the prefill is given up', async () => {
    const { proxy, producer, consumer } = await pair();
    const response = post(proxy);
    await producer.asked();
    await consumer.answer(400, { error: { code: 'REQUEST_INVALID' } });
    expect((await response).status).toBe(400);
    expect(await (await response).json()).toMatchObject({ error: { code: 'REQUEST_INVALID' } });
    await producer.untilAborted();
    await Promise.all([producer, consumer].map((one) => one.untilTold('/kv/release')));
  });

  test('that fails before the producer has: the producer is heard first', async () => {
    const proxy = await startProxy();
    const victim = await Scripted.start(proxy, 'producer');
    const producer = await Scripted.start(proxy, 'producer', { answer: answerJson() });
    const consumer = await Scripted.start(proxy, 'consumer');
    const response = post(proxy);
    const prefill = await victim.asked();
    await consumer.answer(502, { error: { code: 'KV_LOAD_FAILED', message: 'the pair is over' } });
    prefill.destroy(); // it died, and that is why
    const out = await consumer.asked(1);
    await answerJson(200, { text: 'good' })(consumer.requests[1]!, out);
    expect(await (await response).json()).toMatchObject({ text: 'good' });
    expect(producer.requests).toHaveLength(1);
  });

  test('that fails by itself: its error, once the producer is done', async () => {
    const { proxy, producer, consumer } = await pair();
    const response = post(proxy);
    await producer.asked();
    await consumer.answer(500, { error: { code: 'INTERNAL' } });
    await producer.answer();
    expect((await response).status).toBe(500);
    await producer.untilTold('/kv/release');
  });
});

test('a client that leaves: both are given up and their KV released', async () => {
  const { proxy, producer, consumer } = await pair();
  const client = new AbortController();
  const response = post(proxy, REQUEST, client.signal);
  await Promise.all([producer.asked(), consumer.asked()]);
  client.abort();
  await expect(response).rejects.toThrow();
  for (const one of [producer, consumer]) {
    await one.untilAborted();
    expect((await one.untilTold('/kv/release')).json['request_id']).toBe(idOf(one.requests[0]!));
  }
  await untilIdle(proxy);
});
