/**
 * How fast the proxy alone is: what a request and a streamed token take it, how many streams one core bears, more processes (--workers), and
 * what it adds to requests of all sizes, beside nginx and HAProxy. Instances and load are elsewhere on this machine, on cores of their own.
 *
 *   scripts/proxy-results.sh
 *   node dist/bench/proxy/speed.js [--only features,streams,workers,grid] [--small] [--peers DIR] [--out DIR]
 */
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { parseArgs } from 'node:util';
import { PROXY_OPTIONS } from '../../src/config/proxy-config.ts';
import { freePorts } from '../../src/net/free-ports.ts';
import { readMachine } from '../measure/machine.ts';
import { hardwareLines, problemLines, writeResults } from '../measure/results.ts';
import type { Spread } from '../measure/statistics.ts';
import { markdownTable } from '../measure/table.ts';
import { type Layout, layoutFor } from './cores.ts';
import { type Fleet, type FleetOptions, load, startFleet, startOn, stopAll } from './fleet.ts';
import { type LoadPlan, PREFIXES } from './load-plan.ts';

const PARTS = ['features', 'streams', 'workers', 'grid'] as const;

const { values: options } = parseArgs({
  options: {
    only: { type: 'string', default: PARTS.join(',') },
    small: { type: 'boolean', default: false },
    /** A folder with `nginx` and `haproxy`, and `lib/` with what they need that the machine lacks. */
    peers: { type: 'string' },
    out: { type: 'string', default: 'bench/results' },
    command: { type: 'string', default: 'node dist/bench/proxy/speed.js' },
  },
});
const wanted = new Set(options.only.split(','));

/** 512 tokens of English, about. */
const PROMPT_BYTES = 2_048;
const CONNECTIONS = 64;
const EVENTS = 16;
/** 50 tokens a second. */
const PACE_MS = 20;
const GOAL_MS = 5;
const STREAMS = options.small ? [50, 100] : [100, 200, 400, 600, 800, 1_000, 1_300, 1_600, 2_000];
const WORKERS = options.small ? [1, 2] : [1, 2, 4, 8];
const BODIES = [200, 4_096, 65_536, 1_048_576];
const MS = options.small ? 600 : 4_000;
const WARM_UP_MS = options.small ? 400 : 1_500;
/** Of a proxy that has just started, twice: V8 compiles what it runs, and its heap grows by collections of up to 20 ms. */
const FRESH_MS = options.small ? 200 : 2_000;
const CELL_MS = options.small ? 200 : 600;
const CELL_WARM_UP_MS = options.small ? 100 : 300;

const problems: string[] = [];
const body: string[] = [];
const json: Record<string, unknown> = {};
const layout = layoutFor(1);

const us = (ms: number) => (ms * 1_000).toFixed(0);
const ms = (value: number) => value.toFixed(2);

interface Measured {
  readonly perSecond: number;
  readonly latencyMs: Spread;
  /** Of the proxy, for each answer or event. */
  readonly cpuUs: number;
  /** Of all its processes together. */
  readonly cores: number;
}

async function measure(
  fleet: Pick<Fleet, 'port' | 'cpuUs'>,
  plan: Omit<LoadPlan, 'seed' | 'port' | 'warmUpMs' | 'ms'>,
  on: Layout = layout,
): Promise<Measured> {
  const before = fleet.cpuUs();
  const result = await load({ ...plan, port: fleet.port, warmUpMs: WARM_UP_MS, ms: MS }, on.load);
  const cpu = fleet.cpuUs() - before;
  if (result.failed > 0) problems.push(`${result.failed} of ${result.all} failed: ${JSON.stringify(plan)}`);
  const { perSecond, latencyMs } = result;
  return { perSecond, latencyMs, cpuUs: cpu / result.all, cores: cpu / 1_000 / (WARM_UP_MS + MS) };
}

async function withFleet<T>(
  settings: Partial<FleetOptions>,
  work: (fleet: Fleet) => Promise<T>,
  on: Layout = layout,
): Promise<T> {
  const fleet = await startFleet({
    proxyArgs: [],
    pairs: 2,
    kind: 'vllm',
    events: EVENTS,
    proxyCores: on.proxy,
    backendCores: on.backends,
    ...settings,
  });
  try {
    await warmUp(fleet.port, settings.paceMs === undefined ? 'streamed' : 'paced', on);
    return await work(fleet);
  } finally {
    await fleet.stop();
  }
}

/** So that the first to be measured compares with what comes later. */
async function warmUp(port: number, answers: 'streamed' | 'paced', on: Layout): Promise<void> {
  for (const kind of ['whole', answers] as const) {
    await load({ ...REQUEST, port, headers: SHOWN, answers: kind, warmUpMs: 0, ms: FRESH_MS }, on.load);
  }
}

const REQUEST = { connections: CONNECTIONS, bodyBytes: PROMPT_BYTES, prefixes: 'cold' } as const;

const KEY = 'sk-00000000000000000000';
const WORK = mkdtempSync(join(tmpdir(), 'pd-proxy-speed-'));
process.on('exit', () => rmSync(WORK, { recursive: true }));
writeFileSync(join(WORK, 'keys'), `a ${KEY}\nb sk-11111111111111111111\n`);
const KEYED = ['--api-key-file', join(WORK, 'keys')];
const SHOWN = { authorization: `Bearer ${KEY}` };
const LIMITED = ['--max-running', '10000', '--max-running-tokens', '100000000'];
const BARE = ['--policy', 'round-robin', '--health-interval', '0', '--log-level', 'warn'];
/** From the least to all that is on where keys are, one more at a time. */
const FEATURES: readonly (readonly [string, Partial<FleetOptions>, LoadPlan['headers']?])[] = [
  ['two hops, nothing else (round robin, no probes, warnings only)', { proxyArgs: BARE }],
  ['+ a line in the log for each', { proxyArgs: BARE.slice(0, 4) }],
  ['+ probes: the defaults', { proxyArgs: [] }],
  ['+ kv-aware', { proxyArgs: ['--policy', 'kv-aware'] }],
  ['+ keys', { proxyArgs: ['--policy', 'kv-aware', ...KEYED] }, SHOWN],
  ['+ limits', { proxyArgs: ['--policy', 'kv-aware', ...KEYED, ...LIMITED] }, SHOWN],
  [
    'kv-aware and keys, workers of ours: both asked at once',
    { proxyArgs: ['--policy', 'kv-aware', ...KEYED], kind: 'ours' },
    SHOWN,
  ],
];

async function features(): Promise<void> {
  const rows: string[][] = [];
  const kept: object[] = [];
  for (const [name, settings, headers = {}] of FEATURES) {
    await withFleet(settings, async (fleet) => {
      const whole = await measure(fleet, { ...REQUEST, headers, answers: 'whole' });
      const streamed = await measure(fleet, { ...REQUEST, headers, answers: 'streamed' });
      kept.push({ name, whole, streamed });
      rows.push([
        name,
        ...[whole, streamed].flatMap(({ perSecond, cpuUs, latencyMs }) => [
          perSecond.toFixed(0),
          cpuUs.toFixed(0),
          ms(latencyMs.p50),
          ms(latencyMs.p99),
        ]),
      ]);
    });
  }
  json['features'] = kept;
  const head = ['requests/s', 'CPU us', 'p50 ms', 'p99 ms'];
  body.push(
    '## One core',
    '',
    `Each proxy has served for ${(2 * FRESH_MS) / 1_000} s before it is measured. ${CONNECTIONS} connections, prompts of ${PROMPT_BYTES} bytes (about 512 tokens), none of which had been seen before; two producers and two consumers. *CPU us*: user and`,
    `system time of the proxy for each request. Left: whole answers; right: streamed ones of ${EVENTS} events that come at once.`,
    '',
    markdownTable({ head: ['', ...head, ...head], rows }),
    '',
  );
}

async function streams(): Promise<void> {
  const rows: string[][] = [];
  const kept: object[] = [];
  let most = 0;
  const plan = { bodyBytes: PROMPT_BYTES, prefixes: 'cold', answers: 'paced', paceMs: PACE_MS } as const;
  for (const connections of STREAMS) {
    const { direct, proxied } = await withFleet(
      { paceMs: PACE_MS, pairs: Math.max(2, Math.ceil(layout.backends.length / 2)) },
      async (fleet) => ({
        // One instance gets what two or more share behind the proxy, so a part of the streams.
        direct: await measure(
          { port: fleet.instancePort, cpuUs: fleet.cpuUs },
          {
            ...plan,
            connections: Math.ceil(connections / Math.max(2, Math.ceil(layout.backends.length / 2))),
          },
        ),
        proxied: await measure(fleet, { ...plan, connections }),
      }),
    );
    kept.push({ connections, direct, proxied });
    rows.push([
      String(connections),
      proxied.perSecond.toFixed(0),
      proxied.cpuUs.toFixed(1),
      `${(proxied.cores * 100).toFixed(0)}%`,
      ...[proxied.latencyMs.p50, proxied.latencyMs.p99, proxied.latencyMs.max].map(ms),
      ...[direct.latencyMs.p50, direct.latencyMs.p99].map(ms),
    ]);
    if (proxied.latencyMs.p99 >= GOAL_MS) break;
    most = connections;
  }
  json['streams'] = kept;
  body.push(
    '## Streams on one core',
    '',
    `Streams of ${1_000 / PACE_MS} events a second, each an SSE event of its own; defaults. *ms*: from an instance's write to the client's read, so the way of the event`,
    `itself is in it; on the right the same without the proxy. **${most} streams** with a p99 under ${GOAL_MS} ms.`,
    '',
    markdownTable({
      head: [
        ...['streams', 'events/s', 'CPU us an event', 'of the core'],
        ...['p50 ms', 'p99 ms', 'max ms', 'direct p50', 'direct p99'],
      ],
      rows,
    }),
    '',
  );
}

async function workers(): Promise<void> {
  if (!('workers' in PROXY_OPTIONS)) return;
  const rows: string[][] = [];
  const kept: object[] = [];
  for (const count of WORKERS) {
    const on = layoutFor(count === 1 ? 1 : count + 1);
    const proxyArgs = ['--workers', String(count), '--policy', 'kv-aware'];
    const [whole, paced] = [
      await withFleet(
        { proxyArgs, pairs: 4 },
        (fleet) => measure(fleet, { ...REQUEST, connections: CONNECTIONS * count, answers: 'whole' }, on),
        on,
      ),
      await withFleet(
        { proxyArgs, pairs: 4, paceMs: PACE_MS },
        (fleet) =>
          measure(
            fleet,
            {
              ...REQUEST,
              connections: (options.small ? 50 : 500) * count,
              answers: 'paced',
              paceMs: PACE_MS,
            },
            on,
          ),
        on,
      ),
    ];
    kept.push({ count, whole, paced, on });
    rows.push([
      String(count),
      `${on.proxy.length}${on.apart ? '' : ', shared with load'}`,
      whole.perSecond.toFixed(0),
      whole.cpuUs.toFixed(0),
      ms(whole.latencyMs.p50),
      ms(whole.latencyMs.p99),
      paced.perSecond.toFixed(0),
      paced.cpuUs.toFixed(1),
      ms(paced.latencyMs.p50),
      ms(paced.latencyMs.p99),
    ]);
  }
  json['workers'] = kept;
  const more = ['CPU us', 'p50 ms', 'p99 ms'];
  body.push(
    '## More processes',
    '',
    `\`--workers N --policy kv-aware\`: N processes that relay, and with more than one another that owns discovery, index, limits and breakers. Left: ${CONNECTIONS} connections`,
    'for each of them, whole answers; right: 500 streams for each. CPU: of all its processes.',
    '',
    markdownTable({ head: ['--workers', 'cores', 'requests/s', ...more, 'events/s', ...more], rows }),
    '',
  );
}

interface Target {
  readonly name: string;
  readonly port: number;
  /** Others do not look at prompts: one will do. */
  readonly prefixes: readonly LoadPlan['prefixes'][];
}

async function grid(): Promise<void> {
  const two = { proxyArgs: ['--policy', 'kv-aware'], pairs: 2 } as const;
  const cells = new Map<string, Spread>();
  const targets: Target[] = [];
  const rows: string[][] = [];
  await withFleet(two, async (fleet) => {
    const work = mkdtempSync(join(tmpdir(), 'pd-peers-'));
    const peers = await startPeers(fleet.instancePort, work);
    const alone = await startFleet({
      ...{ kind: 'ours', pairs: 2, events: EVENTS, proxyCores: layout.proxy, backendCores: layout.backends },
      proxyArgs: ['--policy', 'kv-aware', '--bypass-tokens', '1000000'],
    });
    await warmUp(alone.port, 'streamed', layout);
    targets.push(
      { name: 'direct', port: fleet.instancePort, prefixes: ['hot'] },
      { name: 'pd-proxy, two hops', port: fleet.port, prefixes: PREFIXES },
      { name: 'pd-proxy, one hop', port: alone.port, prefixes: PREFIXES },
      ...peers.targets,
    );
    try {
      for (const connections of [1, 64]) {
        for (const bodyBytes of BODIES) {
          for (const target of targets) {
            for (const prefixes of target.prefixes) {
              const plan = { port: target.port, connections, bodyBytes, prefixes, answers: 'whole' } as const;
              const cell = await load({ ...plan, warmUpMs: CELL_WARM_UP_MS, ms: CELL_MS }, layout.load);
              if (cell.failed > 0)
                problems.push(`${target.name}: ${cell.failed} failed: ${JSON.stringify(plan)}`);
              cells.set([connections, bodyBytes, target.name, prefixes].join(), cell.latencyMs);
            }
          }
        }
      }
    } finally {
      await alone.stop();
      await peers.stop();
      rmSync(work, { recursive: true });
    }
  });
  const kept: object[] = [];
  for (const connections of [1, 64]) {
    for (const bodyBytes of BODIES) {
      const direct = cells.get([connections, bodyBytes, 'direct', 'hot'].join())!;
      const row = [String(connections), sizeOf(bodyBytes), us(direct.p50)];
      for (const { name, prefixes } of targets.slice(1)) {
        for (const prefix of prefixes) {
          const cell = cells.get([connections, bodyBytes, name, prefix].join())!;
          kept.push({ connections, bodyBytes, name, prefix, latencyMs: cell, direct });
          row.push(us(cell.p50 - direct.p50));
        }
      }
      rows.push(row);
    }
  }
  json['grid'] = kept;
  const head = targets
    .slice(1)
    .flatMap(({ name, prefixes }) =>
      prefixes.map((prefix) => (prefixes.length > 1 ? `${name.replace('pd-proxy, ', '')}, ${prefix}` : name)),
    );
  const missing = ['nginx', 'HAProxy'].filter(
    (name) => !targets.some((target) => target.name.startsWith(name)),
  );
  body.push(
    '## Added to a request',
    '',
    'Microseconds that the median of whole answers takes longer than directly from one instance, with `--policy kv-aware`; *two hops* asks a producer, then a consumer,',
    '*one hop* (`--bypass-tokens`) the consumer alone, as nginx and HAProxy do. Prompts: *hot*: always the same; *cold*: never; *mixed*: half and half; *shared*: the',
    `first three quarters the same.${missing.length > 0 ? ` Not on this machine: ${missing.join(' and ')}.` : ''}`,
    '',
    markdownTable({ head: ['connections', 'body', 'direct us', ...head], rows }),
    '',
  );
}

function sizeOf(bytes: number): string {
  if (bytes >= 1_048_576) return `${bytes / 1_048_576} MiB`;
  return bytes >= 1_024 ? `${bytes / 1_024} KiB` : `${bytes} B`;
}

/** nginx and HAProxy in front of one instance, one process and one thread each, on the proxy's core. */
async function startPeers(instancePort: number, work: string) {
  const [nginxPort, haproxyPort] = await freePorts(2, '127.0.0.1');
  const files = {
    nginx: `daemon off; master_process off; worker_processes 1; pid ${work}/nginx.pid; error_log stderr warn;
events { worker_connections 4096; }
http {
  access_log off; client_max_body_size 4m; client_body_buffer_size 2m; keepalive_requests 100000000;
  client_body_temp_path ${work}/body; proxy_temp_path ${work}/proxy; fastcgi_temp_path ${work}/f; uwsgi_temp_path ${work}/u; scgi_temp_path ${work}/s;
  upstream instance { server 127.0.0.1:${instancePort}; keepalive 256; keepalive_requests 100000000; }
  server {
    listen 127.0.0.1:${nginxPort};
    location / { proxy_pass http://instance; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }
}
`,
    haproxy: `global
  nbthread 1
  maxconn 4096
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  http-reuse always
listen proxy
  bind 127.0.0.1:${haproxyPort}
  server instance 127.0.0.1:${instancePort}
`,
  };
  for (const [name, text] of Object.entries(files)) writeFileSync(join(work, `${name}.conf`), text);
  const [nginx, haproxy] = [find('nginx'), find('haproxy')];
  const env = { ...process.env, ...(options.peers && { LD_LIBRARY_PATH: join(options.peers, 'lib') }) };
  const started = [
    ...(nginx ? [startOn(layout.proxy, [nginx, '-p', work, '-c', join(work, 'nginx.conf')], { env })] : []),
    ...(haproxy ? [startOn(layout.proxy, [haproxy, '-f', join(work, 'haproxy.conf')], { env })] : []),
  ];
  const targets: Target[] = [];
  for (const [name, there, port] of [
    ['nginx, one hop', nginx, nginxPort!],
    ['HAProxy, one hop', haproxy, haproxyPort!],
  ] as const) {
    if (!there) continue;
    if (await answers(port)) targets.push({ name, port, prefixes: ['hot'] });
    else problems.push(`${name} does not answer`);
  }
  return { targets, stop: () => stopAll(started) };
}

function find(name: string): string | undefined {
  const folders = [options.peers, ...(process.env['PATH'] ?? '').split(delimiter), '/usr/sbin'];
  return folders.flatMap((folder) => (folder ? [join(folder, name)] : [])).find((file) => existsSync(file));
}

async function answers(port: number): Promise<boolean> {
  for (let tries = 0; tries < 100; tries++) {
    const answer = await fetch(`http://127.0.0.1:${port}/v1/models`).catch(() => undefined);
    if (answer?.ok) return true;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return false;
}

const run = { features, streams, workers, grid };
for (const part of PARTS) {
  if (!wanted.has(part)) continue;
  process.stderr.write(`${part}\n`);
  try {
    await run[part]();
  } catch (error) {
    problems.push(`${part}: ${(error as Error).message}`);
  }
}
const machine = await readMachine();
const base = writeResults(
  {
    kind: 'proxy',
    title: 'Speed of the proxy',
    date: new Date().toISOString().slice(0, 10),
    hardware: 'host',
    machine: [
      ...hardwareLines(machine, { libraries: [], gpus: [] }),
      `- Node ${machine.node}; ${layout.apart ? `proxy on core ${layout.proxy.join()}, load on ${layout.load.join()}, instances on ${layout.backends.join()}` : 'too few cores: load and instances share theirs, so what is per second says little; CPU time does'}`,
    ],
    command: options.command,
    body: [...body, ...problemLines(problems)],
    json: { benchmark: 'proxy', machine, layout, ...json, problems },
  },
  options.out,
);
console.log(body.join('\n'));
console.log(`${base}.md`);
process.exitCode = problems.length > 0 ? 1 : 0;
