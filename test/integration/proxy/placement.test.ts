/** Which instances a client's requests reach under each policy. What each policy decides is in test/unit/proxy/placement.test.ts. */
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, onTestFinished, test } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { type BlockHash, extendHashes } from '../../../src/kv/block-hash.ts';
import { Tokenizer } from '../../../src/model/tokenizer.ts';
import { formatHostPort } from '../../../src/net/address.ts';
import { createLogger } from '../../../src/observability/log.ts';
import { PromptReader } from '../../../src/proxy/prompt-reader.ts';
import type { PdProxy } from '../../../src/proxy/proxy.ts';
import { PROMPT_IDS_FEATURE } from '../../../src/wire/prompt-ids.ts';
import { KvEventPublisher } from '../../../src/worker/kv-events.ts';
import { answerJson, FakeUpstream } from '../../support/fake-upstream.ts';
import { startProxy, startUpstream } from '../../support/proxies.ts';
import { startQuietProxy } from '../../support/quiet-proxy.ts';

interface Pool {
  readonly proxy: PdProxy;
  readonly producers: readonly FakeUpstream[];
  readonly consumers: readonly FakeUpstream[];
  /** Sends it, and says which producer and which consumer it reached. */
  post(body: object, headers?: Record<string, string>): Promise<readonly [number, number]>;
}

async function pool(settings: Parameters<typeof startQuietProxy>[0]): Promise<Pool> {
  const proxy = await startProxy(settings);
  const producers = await Promise.all([1, 2, 3].map(() => startUpstream(proxy, 'producer')));
  const consumers = await Promise.all([1, 2, 3].map(() => startUpstream(proxy, 'consumer')));
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
  // The same by instance: each has had four turns of one conversation.
  const ofProducers = (name: string, more: string) =>
    producers.map(({ httpAddress }) => {
      const series = `pd_proxy_worker_${name}{worker="${httpAddress}",role="producer",policy="kv-aware"${more}} `;
      const line = metrics.split('\n').find((one) => one.startsWith(series))!;
      return Number(line.slice(series.length));
    });
  expect(ofProducers('selections_total', '')).toEqual([4, 4, 4]);
  const hits = ofProducers('placed_tokens_total', ',cached="yes"');
  expect(hits.reduce((sum, tokens) => sum + tokens)).toBe(Number(cached?.[1]));

  const home = homes[0]!;
  await producers[home[0]]!.kill();
  const [elsewhere] = await post({ messages: conversations[0]! });
  expect(elsewhere).not.toBe(home[0]);
});

test('a prompt with little to compute goes to its consumer alone, where that is one of ours', async () => {
  const proxy = await startProxy({ policy: 'kv-aware', bypassTokens: 150 });
  const start = (role: 'producer' | 'consumer') => startUpstream(proxy, role, answerJson(), { digest: 'd1' });
  const [producer, consumer] = await Promise.all([start('producer'), start('consumer')]);
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

  test('one that is empty is none: those who send it do not share an instance', async () => {
    const { post } = await pool({ policy: 'session' });
    const [, first] = await post({ user: '' });
    const [, second] = await post({ user: '' });
    expect(second).not.toBe(first);
    const [, home] = await post({ user: 'one' }, { 'x-session-id': '' });
    const [, again] = await post({ user: 'one' });
    expect(again).toBe(home);
  });
});

describe('with a tokenizer', () => {
  const LOG = createLogger({ level: 'silent', format: 'json' }, 'test');

  /** A producer that publishes what it has cached, and pings with this digest of its tokenizer. */
  async function publishing(proxy: PdProxy, tokenizer: string) {
    const bind = { host: '127.0.0.1', port: 0 };
    const told = { model: 'm', blockSize: 16, form: 'map', medium: 'CPU', log: LOG } as const;
    const publisher = await KvEventPublisher.open({ bind, ...told });
    onTestFinished(() => publisher.close());
    const upstream = await FakeUpstream.start('producer', answerJson());
    onTestFinished(() => upstream.kill());
    publisher.announce(upstream.httpAddress);
    const more = { events: publisher.ports, tokenizer };
    await upstream.ping(proxy.discoveryAddress, 'd1', [PROMPT_IDS_FEATURE], more);
    return { upstream, publisher };
  }

  test('a proxy whose tokenizer is not there does not start', async () => {
    const tokenizer = dirname(fileURLToPath(import.meta.url));
    await expect(startQuietProxy({ tokenizer })).rejects.toMatchObject({ code: 'CHECKPOINT_INVALID' });
  });

  test('a prompt of text goes where its blocks are said to be, with its ids where these are the same', async () => {
    const dir = demoModelDir();
    const reader = await PromptReader.load(dir);
    const proxy = await startProxy({ policy: 'kv-aware', tokenizer: dir });
    const own = await Tokenizer.digestOf(dir);
    const producers = await Promise.all([own, own, 'other'].map((digest) => publishing(proxy, digest)));
    const consumer = await FakeUpstream.start('consumer', answerJson());
    onTestFinished(() => consumer.kill());
    await consumer.ping(proxy.discoveryAddress, 'd1', [], { tokenizer: own });
    while (proxy.instances.length < 4) await new Promise((resolve) => setImmediate(resolve));

    const messages = [{ role: 'user', content: 'a river that ran uphill, and nobody knew why '.repeat(30) }];
    const body = JSON.stringify({ messages });
    const path = '/v1/chat/completions';
    const ids = reader.idsOf(path, new TextEncoder().encode(body), undefined)!;
    const hashes: BlockHash[] = [];
    extendHashes(hashes, Int32Array.from(ids), 16);
    const url = `http://${formatHostPort(proxy.httpAddress)}`;
    const counter = async (name: string) => {
      const page = await (await fetch(`${url}/metrics`)).text();
      return Number(
        page
          .split('\n')
          .find((line) => line.startsWith(`${name} `))
          ?.split(' ')[1] ?? 0,
      );
    };
    // One that knows these blocks, and one whose hashes would say so too, were its tokens the same.
    const tokens = Int32Array.from(ids.subarray(0, hashes.length * 16));
    for (const { publisher } of producers.slice(1)) publisher.publish([{ type: 'stored', hashes, tokens }]);
    while ((await counter('pd_proxy_cached_blocks')) < 2 * hashes.length);
    const post = async (text = body) => {
      const response = await fetch(url + path, { method: 'POST', body: text });
      expect(response.status).toBe(200);
    };
    // The thread loads its tokenizer first.
    while ((await counter('pd_proxy_prompts_tokenized_total{result="done"}')) === 0) await post();
    const before = producers.map(({ upstream }) => upstream.asked.length);
    for (let i = 0; i < 3; i++) await post();
    const after = producers.map(({ upstream }, at) => upstream.asked.length - before[at]!);
    expect(after).toEqual([0, 3, 0]);
    expect(producers[1]!.upstream.asked.at(-1)!.ids).toEqual(ids);
    expect(consumer.asked.at(-1)).toMatchObject({ raw: body });
    expect(consumer.asked.at(-1)!.ids).toBeUndefined(); // it did not say that it takes any

    // The one with another tokenizer gets text alone.
    for (const { upstream } of producers.slice(0, 2)) await upstream.kill();
    await post(JSON.stringify({ messages, user: 'somebody' }));
    expect(producers[2]!.upstream.asked.at(-1)!.ids).toBeUndefined();
  });
});
