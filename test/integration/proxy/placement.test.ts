/** Which instances a client's requests reach under each policy. What each policy decides is in test/unit/proxy/placement.test.ts. */
import { afterEach, describe, expect, test } from 'vitest';
import { formatHostPort } from '../../../src/net/address.ts';
import type { PdProxy } from '../../../src/proxy/proxy.ts';
import { answerJson, FakeUpstream } from '../../support/fake-upstream.ts';
import { startQuietProxy } from '../../support/quiet-proxy.ts';

const closing: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

interface Pool {
  readonly proxy: PdProxy;
  readonly producers: readonly FakeUpstream[];
  readonly consumers: readonly FakeUpstream[];
  /** Sends it, and says which producer and which consumer it reached. */
  post(body: object, headers?: Record<string, string>): Promise<readonly [number, number]>;
}

async function pool(settings: Parameters<typeof startQuietProxy>[0]): Promise<Pool> {
  const proxy = await startQuietProxy(settings);
  closing.push(() => proxy.close(0));
  const start = async (role: 'producer' | 'consumer') => {
    const upstream = await FakeUpstream.start(role, answerJson());
    closing.push(() => upstream.kill());
    await upstream.ping(proxy.discoveryAddress);
    return upstream;
  };
  const producers = await Promise.all([1, 2, 3].map(() => start('producer')));
  const consumers = await Promise.all([1, 2, 3].map(() => start('consumer')));
  while (proxy.instances.length < 6) await new Promise((resolve) => setImmediate(resolve));
  const post: Pool['post'] = async (body, headers = {}) => {
    const before = [producers, consumers].map((all) => all.map(({ asked }) => asked.length));
    const response = await fetch(`http://${formatHostPort(proxy.httpAddress)}/v1/chat/completions`, {
      method: 'POST',
      headers,
      body: JSON.stringify({ model: 'm', ...body }),
    });
    expect(response.status).toBe(200);
    await response.arrayBuffer();
    const reached = [producers, consumers].map((all, role) =>
      all.findIndex(({ asked }, at) => asked.length > before[role]![at]!),
    );
    return [reached[0]!, reached[1]!];
  };
  return { proxy, producers, consumers, post };
}

const say = (role: string, text: string) => ({ role, content: text.repeat(60) });

test('kv-aware: a conversation goes on where it began, as long as that is there', async () => {
  const { proxy, producers, post } = await pool({ policy: 'kv-aware' });
  const conversations = ['alpha ', 'beta ', 'gamma '].map((text) => [say('user', text)]);
  const homes: (readonly [number, number])[] = [];
  for (const messages of conversations) homes.push(await post({ messages }));
  // Nobody had any of it: they are spread.
  expect(new Set(homes.map(([producer]) => producer)).size).toBe(3);
  for (let turn = 0; turn < 3; turn++) {
    for (const [at, messages] of conversations.entries()) {
      messages.push(say('assistant', `answer ${turn} `), say('user', `and ${turn} `));
      expect(await post({ messages })).toEqual(homes[at]);
    }
  }
  const metrics = await (await fetch(`http://${formatHostPort(proxy.httpAddress)}/metrics`)).text();
  const cached = /pd_proxy_placed_tokens_total\{role="producer",cached="yes"\} (\d+)/.exec(metrics);
  expect(Number(cached?.[1])).toBeGreaterThan(1_000);

  const home = homes[0]!;
  await producers[home[0]]!.kill();
  const [elsewhere] = await post({ messages: conversations[0]! });
  expect(elsewhere).not.toBe(home[0]);
});

test('a prompt with little to compute goes to its consumer alone, where that is one of ours', async () => {
  const proxy = await startQuietProxy({ policy: 'kv-aware', bypassTokens: 150 });
  closing.push(() => proxy.close(0));
  const start = async (role: 'producer' | 'consumer') => {
    const upstream = await FakeUpstream.start(role, answerJson());
    closing.push(() => upstream.kill());
    await upstream.ping(proxy.discoveryAddress, 'd1');
    return upstream;
  };
  const [producer, consumer] = await Promise.all([start('producer'), start('consumer')]);
  while (proxy.instances.length < 2) await new Promise((resolve) => setImmediate(resolve));
  const post = async (messages: object[]) => {
    const body = JSON.stringify({ model: 'm', messages });
    const response = await fetch(`http://${formatHostPort(proxy.httpAddress)}/v1/chat/completions`, {
      method: 'POST',
      body,
    });
    expect(response.status).toBe(200);
    return consumer.asked.at(-1)!.headers['x-request-id'];
  };
  const messages = [say('user', 'a long story ')];
  expect(await post(messages)).toContain('___prefill_addr_');
  messages.push(say('assistant', 'ok '), { role: 'user', content: 'and then?' });
  expect(await post(messages)).toMatch(/^[0-9a-f]{32}$/);
  expect([producer.asked.length, consumer.asked.length]).toEqual([1, 2]);
});

describe('session', () => {
  test('by the header, by `user` where there is none, for consumers alone where so told', async () => {
    const { post } = await pool({ decodePolicy: 'session', sessionHeader: 'x-chat' });
    const messages = [say('user', 'hello ')];
    const [first, home] = await post({ messages }, { 'x-chat': 'one' });
    const [second, again] = await post({ messages, user: 'somebody else' }, { 'x-chat': 'one' });
    expect(again).toBe(home);
    expect(second).not.toBe(first);
    const byUser = await post({ messages, user: 'one' });
    expect(byUser[1]).toBe(home);
  });
});
