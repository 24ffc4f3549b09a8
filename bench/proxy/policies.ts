/**
 * What each policy of placement is worth: conversations of many turns on several producers and consumers behind several proxies, with a
 * system prompt that some share, under one policy after another. Each policy has proxies and prompts of its own; the workers stay.
 *
 *   ./scripts/build.sh && node dist/bench/proxy/policies.js [--producers 3] [--consumers 3] [--proxies 2] [--real]
 *
 * Workers are simulated (simulated.ts), in one process; with `--real` they are those of the demo model, a process each, which on few cores
 * measures these cores.
 */
import type { ChildProcess } from 'node:child_process';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { demoModelDir } from '../../src/config/demo-model.ts';
import { freePorts } from '../../src/net/free-ports.ts';
import { programFile } from '../../support/root.ts';
import { metricsOf } from '../../support/serving.ts';
import { monotonicMs, readMachine } from '../measure/machine.ts';
import { inParallel } from '../measure/parallel.ts';
import { meanOf, spreadOf, sumOf } from '../measure/statistics.ts';
import { markdownTable } from '../measure/table.ts';
import { linesOf, startProgram, stopProgram } from './programs.ts';
import type { Simulation } from './simulated.ts';

const { values: options } = parseArgs({
  options: {
    producers: { type: 'string', default: '3' },
    consumers: { type: 'string', default: '3' },
    proxies: { type: 'string', default: '2' },
    real: { type: 'boolean', default: false },
    /** At a time, and of each policy in all. */
    lanes: { type: 'string', default: '24' },
    conversations: { type: 'string', default: '48' },
    turns: { type: 'string', default: '6' },
    /** Words of a system prompt, and of a turn. */
    system: { type: 'string', default: '800' },
    turn: { type: 'string', default: '160' },
    /** Generated tokens. */
    output: { type: 'string', default: '32' },
    /** Conversations that share a system prompt. */
    shared: { type: 'string', default: '4' },
    /** KV blocks of 16 tokens of a worker; few make it evict. */
    blocks: { type: 'string', default: '2400' },
    /** Rows by name; all where none is given. */
    row: { type: 'string', multiple: true, default: [] },
    /** For the proxies, as it would be given. */
    proxy: { type: 'string', multiple: true, default: [] },
  },
});

const HOST = '127.0.0.1';
/** As of a model of 8B: 10,000 prompt tokens a second, 128 KiB of KV a token at 25 GB/s, steps of 20 ms. */
const TIMES = { prefillMs: 0.1, fetchMs: 0.005, stepMs: 20, sequenceMs: 0.2, chunk: 2_048, sequences: 256 };
const THINK_MS = 500;
const START_MS = 120_000;
/** Of one request; none should come near it. */
const REQUEST_MS = 120_000;

interface Row {
  readonly name: string;
  readonly flags: readonly string[];
}

const TOKENIZER = ['--tokenizer', demoModelDir()];
const ROWS: readonly Row[] = [
  { name: 'round-robin', flags: ['--policy', 'round-robin', ...TOKENIZER] },
  { name: 'least-loaded', flags: ['--policy', 'least-loaded', ...TOKENIZER] },
  { name: 'session', flags: ['--policy', 'session', ...TOKENIZER] },
  { name: 'kv-aware, by text', flags: ['--policy', 'kv-aware'] },
  { name: 'kv-aware, by tokens', flags: ['--policy', 'kv-aware', ...TOKENIZER] },
];

type Workers = Record<'producer' | 'consumer', readonly string[]>;

const children: ChildProcess[] = [];
function start(file: string, args: readonly string[]): ChildProcess {
  const child = startProgram(file, args);
  children.push(child);
  return child;
}

async function startSimulated(discovery: readonly string[]): Promise<Workers> {
  const producers = Number(options.producers);
  const simulation: Simulation = {
    ...TIMES,
    producers,
    consumers: Number(options.consumers),
    discovery,
    tokenizer: demoModelDir(),
    blocks: Number(options.blocks),
  };
  const file = fileURLToPath(new URL('./simulated.js', import.meta.url));
  const [line] = await linesOf(start(file, [JSON.stringify(simulation)]), [/^(\[.*)$/]);
  const urls = JSON.parse(line!) as string[];
  return { producer: urls.slice(0, producers), consumer: urls.slice(producers) };
}

async function startReal(discovery: readonly string[]): Promise<Workers> {
  const workers = { producer: [] as string[], consumer: [] as string[] };
  for (const role of ['producer', 'consumer'] as const) {
    for (let i = 0; i < Number(options[`${role}s`]); i++) {
      const [http, kv] = await freePorts(2, HOST);
      const at = ['--host', HOST, '--port', String(http), '--kv-host', HOST, '--kv-port', String(kv)];
      const proxies = discovery.flatMap((address) => ['--proxy', address]);
      const told = [...proxies, '--kv-events-port', '0', '--prompt-ids-from', HOST];
      const own = ['--role', role, '--device', 'host', '--num-blocks', options.blocks];
      start(programFile('pd-worker'), [...own, ...at, ...told, '--log-level', 'error']).stdout!.resume();
      workers[role].push(`http://${HOST}:${http}`);
    }
  }
  return workers;
}

/** Common words: a token or two each. */
const WORDS =
  'the of and to in a is that it was for on are as with his they at be this from have or by one had not but what all were when we there can an your which their said if do will each about how up out them then she many some so these would other into has more her two like him see time could no make than first been its who now people my made over did down only way find use may water long little very after words called just where most know'.split(
    ' ',
  );

/** Any number from 0 up to `below`, the same for the same `n`: a multiplicative hash. */
const scattered = (n: number, below: number) => (Math.imul(n + 1, 0x9e3779b1) >>> 8) % below;
const words = (seed: number, count: number) =>
  Array.from({ length: count }, (_, i) => WORDS[scattered(seed * 4_099 + i, WORDS.length)]).join(' ');

interface Answer {
  readonly firstMs: number;
  readonly ok: boolean;
  readonly promptTokens: number;
}

async function ask(url: string, session: string, messages: readonly object[]): Promise<Answer> {
  const output = Number(options.output);
  const sampling = { max_tokens: output, min_tokens: output, temperature: 0 };
  const stream = { stream: true, stream_options: { include_usage: true } };
  const begin = monotonicMs();
  let firstMs = 0;
  let text = '';
  try {
    const response = await fetch(`${url}/v1/chat/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'x-session-id': session },
      body: JSON.stringify({ model: 'demo', messages, ...sampling, ...stream }),
      signal: AbortSignal.timeout(REQUEST_MS),
    });
    for await (const chunk of response.body!) {
      if (firstMs === 0) firstMs = monotonicMs() - begin;
      text += Buffer.from(chunk).toString('latin1');
    }
    const ok = response.ok && text.includes('[DONE]') && !text.includes('"error"');
    return { firstMs, ok, promptTokens: Number(/"prompt_tokens":(\d+)/.exec(text)?.[1] ?? 0) };
  } catch {
    return { firstMs, ok: false, promptTokens: 0 };
  }
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

/** Turns of one conversation go to the proxies in turn, as behind a balancer that knows nothing of it. */
async function converse(urls: readonly string[], seed: number, at: number): Promise<Answer[]> {
  const system = words(seed * 1_000 + Math.floor(at / Number(options.shared)), Number(options.system));
  const messages: object[] = [{ role: 'system', content: system }];
  const answers: Answer[] = [];
  for (let turn = 0; turn < Number(options.turns); turn++) {
    const own = seed * 100_000 + at * 100 + turn;
    messages.push({ role: 'user', content: words(own, Number(options.turn)) });
    answers.push(await ask(urls[(at + turn) % urls.length]!, `${seed}-${at}`, messages));
    messages.push({ role: 'assistant', content: words(own + 50, Number(options.output)) });
    await sleep(scattered(own, 2 * THINK_MS));
  }
  return answers;
}

async function underPolicy(
  { name, flags }: Row,
  seed: number,
  discoveries: readonly number[],
  workers: Workers,
): Promise<string[]> {
  const ports = await freePorts(discoveries.length, HOST);
  const proxies = discoveries.map((discovery, i) => {
    const at = ['--host', HOST, '--port', String(ports[i]), '--discovery-port', String(discovery)];
    return start(programFile('pd-proxy'), [...at, ...flags, '--log-level', 'error', ...options.proxy]);
  });
  for (const proxy of proxies) proxy.stdout!.resume();
  const urls = ports.map((port) => `http://${HOST}:${port}`);
  try {
    for (const url of urls) await untilReady(url, workers);
    const before = { producer: await hitsOf(workers.producer), consumer: await hitsOf(workers.consumer) };
    const begin = monotonicMs();
    const conversations = Array.from({ length: Number(options.conversations) }, (_, at) => at);
    const lanes = Number(options.lanes);
    const answers = (await inParallel(conversations, lanes, (at) => converse(urls, seed, at))).flat();
    const seconds = (monotonicMs() - begin) / 1_000;
    const share = async (role: 'producer' | 'consumer') => {
      const { asked, found } = await hitsOf(workers[role]);
      const of = asked - before[role].asked;
      return of > 0 ? `${((100 * (found - before[role].found)) / of).toFixed(0)}%` : '-';
    };
    const done = answers.filter(({ ok }) => ok);
    const first = spreadOf(done.map(({ firstMs }) => firstMs));
    const tokens = done.length > 0 ? meanOf(done.map(({ promptTokens }) => promptTokens)) : 0;
    return [
      name,
      await share('producer'),
      await share('consumer'),
      first ? first.p50.toFixed(0) : '-',
      first ? first.p90.toFixed(0) : '-',
      (done.length / seconds).toFixed(1),
      String(answers.length - done.length),
      tokens.toFixed(0),
    ];
  } finally {
    for (const proxy of proxies) await stopProgram(proxy);
  }
}

/** All ping, and what they have cached is known where that is asked for. */
async function untilReady(url: string, { producer, consumer }: Workers): Promise<void> {
  const until = monotonicMs() + START_MS;
  const wanted = producer.length + consumer.length;
  while (monotonicMs() < until) {
    await sleep(100);
    const health = await fetch(`${url}/health`).catch(() => undefined);
    const { instances = [] } = ((await health?.json()) ?? {}) as { instances?: unknown[] };
    if (instances.length < wanted) continue;
    await sleep(1_500); // a tokenizer, and what is cached
    return;
  }
  throw new Error(`${wanted} instances did not come within ${START_MS} ms`);
}

try {
  const discoveries = await freePorts(Number(options.proxies), HOST);
  const addresses = discoveries.map((port) => `${HOST}:${port}`);
  const workers = await (options.real ? startReal(addresses) : startSimulated(addresses));
  const rows: string[][] = [];
  for (const [at, row] of ROWS.entries()) {
    if (options.row.length > 0 && !options.row.includes(row.name)) continue;
    const cells = await underPolicy(row, at + 1, discoveries, workers);
    rows.push(cells);
    process.stderr.write(`${cells.join('  ')}\n`);
  }
  const { producers, consumers, proxies, lanes, conversations, turns, real } = options;
  const { cpu, cores } = await readMachine();
  process.stdout.write(
    `${producers} ${real ? 'real' : 'simulated'} producers, ${consumers} consumers, ${proxies} proxies (${cpu}, ${cores} cores);\n` +
      `${conversations} conversations of ${turns} turns, ${lanes} at a time, in groups of ${options.shared} with one system prompt\n\n`,
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
  process.stdout.write(`${markdownTable({ head: [...head, 'prompt tokens'], rows })}\n`);
} finally {
  for (const child of children.reverse()) await stopProgram(child);
}
process.exit(0);
