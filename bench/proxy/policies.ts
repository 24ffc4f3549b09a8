/**
 * What each policy of placement is worth: conversations of many turns on several producers and consumers, with a system prompt that some
 * share, under one policy after another. Each policy has a proxy and prompts of its own; the workers stay.
 *
 *   ./scripts/build.sh && node dist/bench/proxy/policies.js [--producers 3] [--consumers 3] [--conversations 12] [--turns 6] [--ids]
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { parseArgs } from 'node:util';
import { POLICIES, type Policy } from '../../src/config/proxy-config.ts';
import { freePorts } from '../../src/net/free-ports.ts';
import { programFile } from '../../support/root.ts';
import { metricsOf } from '../../support/serving.ts';
import { monotonicMs, readMachine } from '../measure/machine.ts';
import { spreadOf, sumOf } from '../measure/statistics.ts';
import { plainTable } from '../measure/table.ts';

const { values: options } = parseArgs({
  options: {
    producers: { type: 'string', default: '3' },
    consumers: { type: 'string', default: '3' },
    conversations: { type: 'string', default: '12' },
    turns: { type: 'string', default: '6' },
    /** Token ids instead of text: then kv-aware goes by what workers say, not by a guess. */
    ids: { type: 'boolean', default: false },
    /** KV blocks of a worker; few make it evict. */
    blocks: { type: 'string', default: '1024' },
    /** All policies where none is given. */
    policy: { type: 'string', multiple: true, default: [...POLICIES] },
    /** For the proxy, as it would be given. */
    proxy: { type: 'string', multiple: true, default: [] },
  },
});

const HOST = '127.0.0.1';
/** Of a system prompt that four conversations share, and of what each turn adds. Token ids, or words. */
const SYSTEM = 96;
const TURN = 96;
const OUTPUT = 16;
const SHARED_BY = 4;
const START_MS = 120_000;
/** Of one request; none should come near it. */
const REQUEST_MS = 120_000;

type Workers = Record<'producer' | 'consumer', readonly string[]>;

const children: ChildProcess[] = [];
function start(program: string, args: readonly string[]): ChildProcess {
  const child = spawn(process.execPath, [programFile(program), ...args], {
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  children.push(child);
  return child;
}

async function stop(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  child.kill('SIGTERM');
  await once(child, 'exit');
}

async function startWorkers(discovery: number): Promise<Workers> {
  const workers = { producer: [] as string[], consumer: [] as string[] };
  for (const role of ['producer', 'consumer'] as const) {
    for (let i = 0; i < Number(options[`${role}s`]); i++) {
      const [http, kv] = await freePorts(2, HOST);
      const at = ['--host', HOST, '--port', String(http), '--kv-host', HOST, '--kv-port', String(kv)];
      const more = ['--num-blocks', options.blocks, '--kv-events-port', '0', '--log-level', 'error'];
      start('pd-worker', [
        '--role',
        role,
        '--device',
        'host',
        '--proxy',
        `${HOST}:${discovery}`,
        ...at,
        ...more,
      ]);
      workers[role].push(`http://${HOST}:${http}`);
    }
  }
  return workers;
}

interface Lane {
  readonly session: string;
  readonly system: readonly number[];
  readonly turns: (readonly number[])[];
}

/** Any number from 0 up to `below`, the same for the same `n`: a multiplicative hash. */
const scattered = (n: number, below: number) => (Math.imul(n + 1, 0x9e3779b1) % below) >>> 0;
const numbers = (seed: number, count: number) =>
  Array.from({ length: count }, (_, i) => scattered(seed * 4_099 + i, 900));
const words = (part: readonly number[]) => part.map((n) => `w${n}`).join(' ');

function bodyOf({ system, turns }: Lane) {
  const common = { model: 'demo', max_tokens: OUTPUT, min_tokens: OUTPUT, temperature: 0, stream: true };
  if (options.ids) {
    const prompt = [...system, ...turns.flat()].map((n) => n + 100);
    return { path: '/v1/completions', body: { ...common, prompt } };
  }
  // Words are of several tokens each.
  const short = (part: readonly number[]) => words(part.slice(0, Math.ceil(part.length / 4)));
  const messages = turns.map((turn, at) => ({
    role: at % 2 === 0 ? 'user' : 'assistant',
    content: short(turn),
  }));
  return {
    path: '/v1/chat/completions',
    body: { ...common, messages: [{ role: 'system', content: short(system) }, ...messages] },
  };
}

async function ask(url: string, lane: Lane): Promise<{ readonly firstMs: number; readonly ok: boolean }> {
  const { path, body } = bodyOf(lane);
  const begin = monotonicMs();
  const response = await fetch(url + path, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'x-session-id': lane.session },
    body: JSON.stringify(body),
    signal: AbortSignal.timeout(REQUEST_MS),
  });
  let firstMs = 0;
  let text = '';
  for await (const chunk of response.body!) {
    if (firstMs === 0) firstMs = monotonicMs() - begin;
    text += Buffer.from(chunk).toString('latin1');
  }
  return { firstMs, ok: response.ok && text.includes('[DONE]') && !text.includes('"error"') };
}

interface Hits {
  readonly asked: number;
  readonly found: number;
}

async function hitsOf(urls: readonly string[]): Promise<Hits> {
  const all = await Promise.all(urls.map(metricsOf));
  const total = (name: string) => sumOf(all.map((metrics) => metrics.get(name) ?? 0));
  return { asked: total('vllm:prefix_cache_queries_total'), found: total('vllm:prefix_cache_hits_total') };
}

async function underPolicy(policy: Policy, seed: number, discovery: number, workers: Workers) {
  const [port] = await freePorts(1, HOST);
  const url = `http://${HOST}:${port}`;
  const at = ['--host', HOST, '--port', String(port), '--discovery-port', String(discovery)];
  const proxy = start('pd-proxy', [...at, '--policy', policy, '--log-level', 'error', ...options.proxy]);
  try {
    await untilReady(url, workers);
    const before = { producer: await hitsOf(workers.producer), consumer: await hitsOf(workers.consumer) };
    const firsts: number[] = [];
    let failed = 0;
    const begin = monotonicMs();
    const lanes = Array.from({ length: Number(options.conversations) }, async (_, at) => {
      const lane: Lane = {
        session: `${policy}-${at}`,
        system: numbers(seed * 1_000 + Math.floor(at / SHARED_BY), SYSTEM),
        turns: [],
      };
      for (let turn = 0; turn < Number(options.turns); turn++) {
        lane.turns.push(numbers(seed * 100_000 + at * 100 + turn, TURN));
        const { firstMs, ok } = await ask(url, lane);
        if (ok) firsts.push(firstMs);
        else failed++;
        lane.turns.push(numbers(seed * 100_000 + at * 100 + turn + 50, OUTPUT));
      }
    });
    await Promise.all(lanes);
    const seconds = (monotonicMs() - begin) / 1_000;
    const share = async (role: 'producer' | 'consumer') => {
      const { asked, found } = await hitsOf(workers[role]);
      const of = asked - before[role].asked;
      return of > 0 ? `${((100 * (found - before[role].found)) / of).toFixed(0)}%` : '-';
    };
    const first = spreadOf(firsts);
    return [
      policy,
      await share('producer'),
      await share('consumer'),
      first ? first.p50.toFixed(0) : '-',
      first ? first.p90.toFixed(0) : '-',
      ((firsts.length + failed) / seconds).toFixed(1),
      String(failed),
    ];
  } finally {
    await stop(proxy);
  }
}

/** All ping, and what they have cached is known where that is asked for. */
async function untilReady(url: string, { producer, consumer }: Workers): Promise<void> {
  const until = monotonicMs() + START_MS;
  const wanted = producer.length + consumer.length;
  while (monotonicMs() < until) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    const health = await fetch(`${url}/health`).catch(() => undefined);
    const { instances = [] } = ((await health?.json()) ?? {}) as { instances?: unknown[] };
    if (instances.length < wanted) continue;
    await new Promise((resolve) => setTimeout(resolve, 1_000));
    return;
  }
  throw new Error(`${wanted} instances did not come within ${START_MS} ms`);
}

for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => {
    for (const child of children) child.kill('SIGTERM');
    process.exit(1);
  });
}
try {
  const [discovery] = await freePorts(1, HOST);
  const workers = await startWorkers(discovery!);
  const rows: string[][] = [];
  for (const [at, policy] of (options.policy as Policy[]).entries()) {
    const row = await underPolicy(policy, at + 1, discovery!, workers);
    rows.push(row);
    process.stderr.write(`${row.join('  ')}\n`);
  }
  const { producers, consumers, conversations, turns } = options;
  const load = `${conversations} conversations at a time, ${turns} turns each, as ${options.ids ? 'token ids' : 'chat'}`;
  const { cpu, cores } = await readMachine();
  process.stdout.write(
    `${producers} producers, ${consumers} consumers on the host (${cpu}, ${cores} cores); ${load}\n\n`,
  );
  const head = [
    'policy',
    'prefill hits',
    'decode hits',
    'TTFT p50 ms',
    'TTFT p90 ms',
    'requests/s',
    'failed',
  ];
  process.stdout.write(plainTable({ head, rows }));
} finally {
  for (const child of children.reverse()) await stop(child);
}
