/** Instances that a proxy is told of: which addresses are asked, what their answers count as, and what is told of those that give none. */
import pino from 'pino';
import { afterEach, expect, it } from 'vitest';
import { namedInstance } from '../../../src/config/kinds.ts';
import { parseValue } from '../../../src/config/options.ts';
import { formatHostPort } from '../../../src/net/address.ts';
import { NamedInstances } from '../../../src/proxy/named-instances.ts';
import { InstanceRegistry } from '../../../src/proxy/registry.ts';
import { UpstreamResponse } from '../../../src/proxy/upstream.ts';

/** What a server answers: status and body, or nothing at all. */
type Answers = Record<string, { readonly status?: number; readonly body?: object | string } | undefined>;

const closing: NamedInstances[] = [];
afterEach(() => {
  for (const one of closing.splice(0)) one.close();
});

const named = (text: string) => parseValue(namedInstance(), text, '--instances');
const ping = (http: string, type: 'P' | 'D' = 'P') => ({
  ...{ type, http_address: http, zmq_address: '10.0.0.1:8082' },
  pd: { version: 1, digest: 'd', model: 'm', load: LOAD },
});
const LOAD = { running: 1, waiting: 2, kv_used: 3, kv_blocks: 4, queued: 5 };

/** Everything that is asked, taken and logged can be awaited. */
function ask(texts: readonly string[], answers: Answers, names: Record<string, readonly string[]> = {}) {
  const taken: string[] = [];
  const asked: string[] = [];
  const lines: string[] = [];
  let wake = () => {};
  const registry = new InstanceRegistry(60_000);
  const log = pino(
    {},
    { write: (line: string) => void lines.push((JSON.parse(line) as { msg: string }).msg) },
  );
  const one = new NamedInstances(
    {
      instances: texts.map(named),
      needsTls: false,
      log,
      intervalMs: 2,
      upstream: {
        inquire: async ({ url }, path) => {
          const key = `${url.replace('http://', '')}${path}`;
          asked.push(key);
          setImmediate(() => wake());
          const answer = answers[key];
          if (!answer) throw new Error('connect ECONNREFUSED');
          const { status = 200, body = {} } = answer;
          const text = typeof body === 'string' ? body : JSON.stringify(body);
          return { response: new UpstreamResponse(status, {}, {} as never), body: Buffer.from(text) };
        },
      },
      take: (message, { at, tls }) => {
        taken.push(`${message.type} ${message.http_address} ${message.zmq_address} at ${formatHostPort(at)}`);
        const role = message.type === 'P' ? 'producer' : 'consumer';
        registry.announce({
          ...{ role, httpAddress: message.http_address, zmqAddress: message.zmq_address, at },
          ...(tls && { tls }),
        });
        return true;
      },
    },
    async (host) => {
      if (/^[\d.]+$/.test(host)) return [{ address: host, family: 4 }];
      const found = names[host];
      if (!found) throw new Error(`getaddrinfo ENOTFOUND ${host}`);
      return found.map((address) => ({ address, family: 4 }));
    },
    3,
  );
  closing.push(one);
  const until = async (condition: () => boolean): Promise<void> => {
    while (!condition())
      await new Promise<void>((resolve) => {
        wake = resolve;
      });
  };
  return { taken, asked, lines, registry, until };
}

it('a worker of ours is what it says, again and again, for as long as it answers', async () => {
  const answers: Answers = { '10.0.0.1:8081/instance': { body: ping('10.0.0.1:8081') } };
  const { taken, lines, asked, until } = ask(['10.0.0.1:8081'], answers);
  await until(() => taken.length > 2);
  expect(new Set(taken)).toEqual(new Set(['P 10.0.0.1:8081 10.0.0.1:8082 at 10.0.0.1:8081']));
  expect(lines).toEqual([]);
  delete answers['10.0.0.1:8081/instance'];
  await until(() => lines.length > 0);
  const [before, then] = [taken.length, asked.length];
  await until(() => asked.length > then + 2);
  expect(taken).toHaveLength(before);
  answers['10.0.0.1:8081/instance'] = { body: ping('10.0.0.1:8081') };
  await until(() => lines.length > 1);
  expect(lines).toEqual([
    '10.0.0.1:8081 (--instances) does not answer as an instance: connect ECONNREFUSED. Asking again',
    '10.0.0.1:8081 (--instances) answers now',
  ]);
});

it('a server that is not ours is what was said of it, while it is well', async () => {
  const answers: Answers = { 'https://10.0.0.3:8000/health': {} };
  const names = { kv: ['10.0.0.9'], vllm: ['10.0.0.3', '10.0.0.4'] };
  const { taken, lines, until } = ask(['consumer=https://vllm:8000/kv:21001'], answers, names);
  await until(() => taken.length > 1);
  expect(taken[0]).toBe('D 10.0.0.3:8000 10.0.0.9:21001 at 10.0.0.3:8000');
  answers['https://10.0.0.3:8000/health'] = { status: 503 };
  await until(() => lines.length > 0);
  expect(lines[0]).toMatch(/^vllm:8000 .* GET \/health is answered with status 503/);
});

it('a name is all its addresses, of which those that are silent beside others are no fault, and may change', async () => {
  const answers: Answers = {
    '10.0.0.1:80/instance': { body: ping('10.0.0.1:80') },
    '10.0.0.3:80/instance': { body: ping('10.0.0.3:80') },
  };
  const names = { workers: ['10.0.0.1', '10.0.0.2'] };
  const { taken, asked, lines, until } = ask(['workers:80'], answers, names);
  await until(() => taken.length > 0 && asked.filter((one) => one.startsWith('10.0.0.2')).length > 1);
  names.workers = ['10.0.0.3'];
  await until(() => taken.some((one) => one.includes('10.0.0.3')));
  // One that still answers is kept; one that does not is let go.
  const seen = asked.length;
  await until(() => asked.length > seen + 20);
  expect(asked.slice(-10).some((one) => one.startsWith('10.0.0.1'))).toBe(true);
  expect(asked.slice(-10).some((one) => one.startsWith('10.0.0.2'))).toBe(false);
  expect(lines).toEqual([]);
});

it('of two addresses that lead to the same instance one is taken, until it falls silent', async () => {
  const says = { body: ping('192.168.0.7:80') };
  const answers: Answers = { '10.0.0.1:80/instance': says, '10.0.0.2:80/instance': says };
  const { taken, asked, registry, until } = ask(['10.0.0.1:80', '10.0.0.2:80'], answers);
  await until(() => asked.filter((one) => one.startsWith('10.0.0.2')).length > 3);
  expect(registry.list()).toMatchObject([
    { httpAddress: '192.168.0.7:80', http: { host: '10.0.0.1', port: 80 } },
  ]);
  // Its own pings are of the same instance.
  const role = 'producer';
  expect(registry.announce({ role, httpAddress: '192.168.0.7:80', zmqAddress: '10.0.0.1:8082' })).toEqual([]);
  expect(registry.list()).toMatchObject([{ http: { host: '10.0.0.1' } }]);
  delete answers['10.0.0.1:80/instance'];
  await until(() => taken.some((one) => one.endsWith('at 10.0.0.2:80')));
  expect(registry.list()).toMatchObject([{ http: { host: '10.0.0.2' } }]);
});

it.each([
  [{ status: 404 }, /it is no pd-worker of a pair; other servers are named as/],
  [{ status: 401 }, /--worker-key-file has none that it knows/],
  [{ status: 503 }, /answered with status 503/],
  [{ body: 'hello' }, /is not valid JSON/],
  [{ body: [] }, /is not a map/],
  [{ body: ping('x'.repeat(5_000)) }, /http_address/],
  [{ body: 'x'.repeat(100_000) }, /is not valid JSON/],
])('an answer %j counts as none', async (answer, message) => {
  const { taken, lines, until } = ask(['10.0.0.1:80'], { '10.0.0.1:80/instance': answer });
  await until(() => lines.length > 0);
  expect(lines[0]).toMatch(message);
  expect(taken).toEqual([]);
});

it('another reason is told, as one that refuses connections may want a key once it is there', async () => {
  const answers: Answers = {};
  const { lines, until } = ask(['10.0.0.1:80'], answers);
  await until(() => lines.length > 0);
  answers['10.0.0.1:80/instance'] = { status: 401 };
  await until(() => lines.length > 1);
  expect(lines).toEqual([
    expect.stringContaining('ECONNREFUSED'),
    expect.stringContaining('--worker-key-file has none that it knows'),
  ]);
});

it('a name without an address is told', async () => {
  const { lines, until } = ask(['nowhere:80', '10.0.0.1:80'], {});
  await until(() => lines.length > 1);
  expect(lines.some((line) => /^nowhere:80 .*its name has no address/.test(line))).toBe(true);
});

it.each([
  '10.0.0.1',
  'producer=10.0.0.1:80',
  '10.0.0.1:80/10.0.0.1:81',
  'both=a:1/b:2',
  'producer=a:1/b:2/c',
  'x://a:1',
  'a:1,b:2',
])('%s names no instance', (text) => expect(() => named(text)).toThrow(/HOST:PORT of a pd-worker/));
