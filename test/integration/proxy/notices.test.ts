/** KV of a request that no consumer will decode is released on both ends, at once. */
import { once } from 'node:events';
import { expect, test } from 'vitest';
import { type Answer, type Asked, answerJson, type FakeUpstream } from '../../support/fake-upstream.ts';
import { startProxy, startUpstream, url } from '../../support/proxies.ts';

async function pair(answers: { producer?: Answer; consumer?: Answer }, digest: string | null = 'd') {
  const proxy = await startProxy();
  const start = (role: 'producer' | 'consumer') =>
    startUpstream(proxy, role, answers[role], { digest: digest ?? undefined });
  const [producer, consumer] = [await start('producer'), await start('consumer')];
  const ask = (body: object, signal?: AbortSignal) =>
    fetch(url(proxy), {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(body),
      ...(signal && { signal }),
    });
  return { producer, consumer, ask };
}

/** The first release that an instance is asked for. */
async function released(upstream: FakeUpstream): Promise<Asked> {
  for (;;) {
    const found = upstream.asked.find(({ path }) => path === '/kv/release');
    if (found) return found;
    await once(upstream.events, 'asked', { signal: AbortSignal.timeout(60_000) });
  }
}

test('when the consumer refuses the request', async () => {
  const { producer, consumer, ask } = await pair({ consumer: answerJson(400) });
  const response = await ask({ prompt: ['a', 'b', 'c'], max_tokens: 9 });
  expect(response.status).toBe(400);
  for (const end of [producer, consumer]) {
    expect((await released(end)).json).toEqual({
      request_id: response.headers.get('x-request-id'),
      route: '/v1/completions',
      prompts: 3,
    });
  }
});

test('when the client goes away while the prompt is computed', async () => {
  const client = new AbortController();
  const { producer, consumer, ask } = await pair({
    producer: ({ path }, out) => (path === '/kv/release' ? void out.end('{}') : client.abort()),
  });
  await expect(ask({ prompt: [1, 2, 3] }, client.signal)).rejects.toThrow();
  expect((await released(consumer)).json).toMatchObject({ prompts: 1 });
  await released(producer);
  expect(consumer.asked).toHaveLength(1);
});

test('not when the consumer has decoded it, and never asked of a worker of vLLM', async () => {
  const served = await pair({});
  expect((await served.ask({ prompt: 'a' })).status).toBe(200);
  const vllm = await pair({ consumer: answerJson(400) }, null);
  expect((await vllm.ask({ prompt: 'a' })).status).toBe(400);
  // What comes after it has passed the same way: had there been a release, it would be here.
  await served.ask({ prompt: 'b' });
  await vllm.ask({ prompt: 'b' });
  for (const { producer, consumer } of [served, vllm]) {
    for (const end of [producer, consumer]) {
      expect(end.asked.map(({ path }) => path)).toEqual(['/v1/completions', '/v1/completions']);
    }
  }
});
