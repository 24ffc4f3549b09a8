/**
 * Whole systems (proxy, producer, consumer as programs) on networks of one family, of both, and with proxy and workers on different ones.
 * Served means served: a load that fails fails the request, and the consumer counts what it loaded.
 */
import { networkInterfaces } from 'node:os';
import { afterEach, describe, expect, test } from 'vitest';
import { PATIENT } from '../support/cluster.ts';
import {
  type Families,
  NETNS_IPV4,
  NETNS_IPV6,
  NETNS_LINK,
  NetworkNamespace,
  netnsUnavailable,
} from '../support/netns.ts';
import { Program } from '../support/process.ts';
import { rows, withTheOthers } from '../support/rows.ts';

const unavailable = netnsUnavailable();
if (unavailable) console.warn(`ipv6: tests in network namespaces skipped: ${unavailable}`);
const hasIpv6 = Object.values(networkInterfaces()).some((list) =>
  list?.some(({ address }) => address === '::1'),
);

const programs: Program[] = [];
const namespaces: NetworkNamespace[] = [];
afterEach(async () => {
  await Promise.all(programs.splice(0).map((program) => program.stop('SIGTERM')));
  await Promise.all(namespaces.splice(0).map((namespace) => namespace.close()));
});

const LOG = ['--log-format', 'json', '--log-level', 'info'];
const SMALL = ['--num-blocks', '64', '--kv-buffer-size', '16MB', '--kv-load-failure', 'fail'];

interface Settings {
  readonly proxy: readonly string[];
  /** Address of the proxy's discovery for producer and consumer, without the port. */
  readonly discovery: readonly [producer: string, consumer: string];
  readonly worker: readonly string[];
}

interface Running {
  /** URLs with the port last, as the programs print them. */
  readonly proxy: string;
  readonly producer: string;
  readonly consumer: string;
}

function start(name: string, args: readonly string[], namespace?: NetworkNamespace): Program {
  const program = new Program(
    name,
    [...args, ...LOG],
    { ...PATIENT, PD_HOST_IP: '' },
    namespace?.prefix ?? [],
  );
  programs.push(program);
  return program;
}

async function urlOf(program: Program): Promise<string> {
  return (await program.line(/Running on (http:\/\/\S+)/))[1]!;
}

async function system(settings: Settings, namespace?: NetworkNamespace): Promise<Running> {
  const proxy = start('pd-proxy', [...settings.proxy, '--port', '0', '--discovery-port', '0'], namespace);
  const proxyUrl = await urlOf(proxy);
  const port = /:(\d+)$/.exec((await proxy.line(/[Dd]iscovery on (\S+)/))[1]!)![1]!;
  const roles = ['producer', 'consumer'] as const;
  const workers = roles.map((role, index) =>
    start(
      'pd-worker',
      [
        ...[
          '--role',
          role,
          '--device',
          'host',
          '--port',
          '0',
          '--kv-port',
          '0',
          '--proxy',
          `${settings.discovery[index]}:${port}`,
        ],
        ...SMALL,
        ...settings.worker,
      ],
      namespace,
    ),
  );
  const [producer, consumer] = await Promise.all(workers.map(urlOf));
  await proxy.line(/🔵Add/);
  await untilBoth(proxy);
  return { proxy: proxyUrl, producer: producer!, consumer: consumer! };
}

/** Both instances have shown up: two lines, which only differ in addresses. */
async function untilBoth(proxy: Program): Promise<void> {
  const first = proxy.lines.findIndex(({ msg }) => msg.includes('🔵Add'));
  await proxy.line(/🔵Add/, 60_000, first + 1);
}

type Fetch = (url: string, body?: object) => Promise<{ readonly status: number; readonly body: unknown }>;

const fetchHere: Fetch = async (url, body) => {
  const headers = { 'content-type': 'application/json' };
  const answer = await fetch(url, body ? { method: 'POST', headers, body: JSON.stringify(body) } : {});
  const text = await answer.text();
  return { status: answer.status, body: text.startsWith('{') ? (JSON.parse(text) as unknown) : text };
};

/** One completion through the proxy; its id, after checking that its KV was moved. */
async function completion(running: Running, get: Fetch): Promise<string> {
  const prompt = 'What is the capital of France?';
  const answer = await get(`${running.proxy}/v1/completions`, {
    model: 'demo',
    prompt,
    max_tokens: 8,
    temperature: 0,
  });
  expect(answer.status, JSON.stringify(answer.body)).toBe(200);
  const { id, choices } = answer.body as { id: string; choices: { text: string }[] };
  expect(choices[0]!.text).toContain('Paris');
  const metrics = String((await get(`${running.consumer}/metrics`)).body);
  expect(metrics).toMatch(/^pd_kv_loads_total\{[^}]*result="ok"[^}]*\} 1$/m);
  return id;
}

/** Addresses that a response id carries, without their ports. */
function hostsOf(id: string): string[] {
  const match = /___prefill_addr_(.+):\d+___decode_addr_(.+):\d+_/.exec(id);
  return match ? [match[1]!, match[2]!] : [];
}

const CASES: readonly (Settings & {
  readonly name: string;
  readonly families: Families;
  readonly hosts: string;
  readonly urls: string;
})[] = [
  {
    name: 'IPv4 only, all by default',
    families: 'ipv4',
    proxy: [],
    discovery: [NETNS_IPV4, NETNS_IPV4],
    worker: [],
    hosts: NETNS_IPV4,
    urls: NETNS_IPV4,
  },
  {
    name: 'IPv6 only, bound to ::, KV by default',
    families: 'ipv6',
    proxy: ['--host', '::'],
    discovery: [`[${NETNS_IPV6}]`, `[${NETNS_IPV6}]`],
    worker: ['--host', '::'],
    hosts: `[${NETNS_IPV6}]`,
    urls: `[${NETNS_IPV6}]`,
  },
  {
    name: 'IPv6 only, on a link whose addresses carry zone ids, the proxy on the same machine',
    families: 'ipv6',
    proxy: ['--host', '::'],
    discovery: ['[::1]', '[::1]'],
    worker: ['--host', `${NETNS_LINK}%pd0`, '--kv-host', `${NETNS_LINK}%pd0`],
    hosts: `[${NETNS_LINK}%pd0]`,
    urls: `[${NETNS_LINK}%pd0]`,
  },
  {
    name: 'v4-mapped addresses bound, IPv4 told',
    families: 'dual',
    proxy: ['--host', '::'],
    discovery: [`[::ffff:${NETNS_IPV4}]`, NETNS_IPV4],
    worker: ['--host', `::ffff:${NETNS_IPV4}`, '--kv-host', `::ffff:${NETNS_IPV4}`],
    hosts: NETNS_IPV4,
    urls: NETNS_IPV4,
  },
  {
    name: 'both families, a producer that pings over IPv4 and a consumer over IPv6',
    families: 'dual',
    proxy: ['--host', '::'],
    discovery: [NETNS_IPV4, `[${NETNS_IPV6}]`],
    worker: ['--host', '::', '--kv-host', NETNS_IPV6],
    hosts: `[${NETNS_IPV6}]`,
    urls: `[${NETNS_IPV6}]`,
  },
  {
    name: 'a proxy on IPv4 before workers on IPv6',
    families: 'dual',
    proxy: ['--host', NETNS_IPV4],
    discovery: [NETNS_IPV4, NETNS_IPV4],
    worker: ['--host', NETNS_IPV6, '--kv-host', NETNS_IPV6],
    hosts: `[${NETNS_IPV6}]`,
    urls: `[${NETNS_IPV6}]`,
  },
  {
    name: 'a proxy on IPv6 before workers on IPv4',
    families: 'dual',
    proxy: ['--host', NETNS_IPV6],
    discovery: [`[${NETNS_IPV6}]`, `[${NETNS_IPV6}]`],
    worker: ['--host', '0.0.0.0', '--kv-host', NETNS_IPV4],
    hosts: NETNS_IPV4,
    urls: NETNS_IPV4,
  },
];

describe.skipIf(unavailable !== undefined)('in a network of its own', () => {
  const few = CASES.filter(({ name }) => /bound to ::/.test(name));
  const others = CASES.filter((each) => !few.includes(each));
  test.each(rows(few, others))('$name', async (settings) => {
    const namespace = await NetworkNamespace.create(settings.families);
    namespaces.push(namespace);
    const running = await system(settings, namespace);
    expect(running.producer).toMatch(/^http:\/\//);
    for (const url of [running.producer, running.consumer]) {
      expect(url.replace(/:\d+$/, '')).toBe(`http://${settings.urls}`);
    }
    const id = await completion(running, (url, body) => namespace.fetchJson(url, body));
    expect(hostsOf(id)).toEqual([settings.hosts, settings.hosts]);
  });
});

const loopback = async () => {
  const running = await system({
    proxy: ['--host', '::1'],
    discovery: ['[::1]', '[::1]'],
    worker: ['--host', '::1', '--kv-host', '::1'],
  });
  expect(running.proxy).toMatch(/^http:\/\/\[::1\]:\d+$/);
  expect(hostsOf(await completion(running, fetchHere))).toEqual(['[::1]', '[::1]']);
};
if (withTheOthers) test.skipIf(!hasIpv6)('on ::1', loopback);
