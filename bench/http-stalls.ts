/**
 * How long one client's request body holds up another client's stream. A worker serves the demo model on the host; while one client
 * streams, another sends bodies of all kinds, one after another. Measured are the longest gap in the stream, and the slowest GET /version
 * meanwhile, which waits for the HTTP thread alone; then the time to first token of a 16-token prompt on the idle worker. With --proxy
 * the bodies go through a pd-proxy instead, to instances that have no model and send an event every 2 ms.
 *
 *   ./scripts/build.sh && node dist/bench/http-stalls.js [--beside FILE] [--tries 3] [--only WORD] [--hostile] [--proxy] [--url URL] [--json]
 *
 * `--hostile`: bodies that are short or long and whose fields explode, nest or name what is not there (support/hostile-bodies.ts).
 * `--url`: a server that runs, such as the proxy of ./bin/pd-launch: bodies pass it, and a producer and a consumer.
 * `--beside ../other/bin/pd-worker` also measures the worker of another checkout, in turn, with the same client.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { Agent, request as httpRequest, type IncomingMessage } from 'node:http';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import { Command, Option } from 'commander';
import { HOSTILE_BODIES, TAKEN_BODIES } from '../support/hostile-bodies.ts';
import { programFile } from '../support/root.ts';
import { monotonicMs, readMachine } from './measure/machine.ts';
import { type Spread, spreadOf } from './measure/statistics.ts';
import { plainTable } from './measure/table.ts';
import { startProxyPair } from './proxy/pair.ts';

const START_MS = 60_000;
/** Deadline of one body; the worker gives none more time than this. */
const BODY_MS = 120_000;
const PROBE_EVERY_MS = 5;
/** In a stream through a proxy. */
const EVENT_EVERY_MS = 2;
/** How long the stream runs undisturbed before each body and after its answer. */
const QUIET_MS = 300;
const WARM_UP_MS = 3_000;
const BASELINE_MS = 2_000;
const FIRST_TOKENS = 500;
const LIMIT = 16 * 2 ** 20;

interface Throw {
  readonly url: string;
  readonly path: string;
  readonly body: Uint8Array;
  /** When the client hangs up. */
  readonly leaveAfterMs?: number;
}

interface Caught {
  /** 0 if the client hung up before the answer. */
  readonly status: number;
  readonly ms: number;
  readonly code: string;
}

/** Runs on a thread of its own, so that writing 16 MiB does not delay the clock of the stream. */
async function send({ url, path, body, leaveAfterMs }: Throw): Promise<Caught> {
  const began = monotonicMs();
  const signal = AbortSignal.timeout(leaveAfterMs ?? BODY_MS);
  const post = httpRequest(new URL(path, url), {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'content-length': body.byteLength },
    signal,
  });
  try {
    post.end(body);
    const [answer] = (await once(post, 'response', { signal })) as [IncomingMessage];
    const chunks: Buffer[] = [];
    for await (const chunk of answer) chunks.push(chunk as Buffer);
    const text = answer.statusCode === 200 ? '' : Buffer.concat(chunks).toString();
    return {
      status: answer.statusCode ?? 0,
      ms: monotonicMs() - began,
      code: /"code":"([A-Z_]+)"/.exec(text)?.[1] ?? '',
    };
  } catch {
    return { status: 0, ms: monotonicMs() - began, code: '' };
  }
}

interface Case {
  readonly name: string;
  readonly path: string;
  readonly body: () => string;
  readonly leaveAfterMs?: number;
}

/** `text` repeated until the body is just within the limit. */
function upToLimit(text: string): string {
  return text.repeat(Math.floor((LIMIT - 4_096) / text.length));
}

function ids(count: number, of = (i: number) => 300 + (i % 1_000)): string {
  return `[${Array.from({ length: count }, (_, i) => of(i)).join(',')}]`;
}

function chat(count: number): string {
  const pairs = '{"role":"user","content":"Why is the sky blue?"},{"role":"assistant","content":"Ask."},';
  return `{"messages":[${pairs.repeat(count / 2 - 1)}{"role":"user","content":"And now?"}],"max_tokens":1}`;
}

const sentence = 'The quick brown fox jumps over the lazy dog, again and again. ';
const prompt = (text: string, more = '') => `{"prompt":${JSON.stringify(text)}${more}}`;
const many = (count: number, each: string) => `[${Array.from({ length: count }, () => each).join(',')}]`;

const CASES: readonly Case[] = [
  { name: 'a word of 500 kB', path: '/tokenize', body: () => prompt('x'.repeat(500_000)) },
  { name: 'a word of 20 kB', path: '/tokenize', body: () => prompt('xy'.repeat(10_000)) },
  { name: 'a word of 3 kB', path: '/tokenize', body: () => prompt('xy'.repeat(1_500)) },
  { name: 'a word of 16 MiB', path: '/tokenize', body: () => prompt(upToLimit('x')) },
  { name: 'text of 16 MiB', path: '/tokenize', body: () => prompt(upToLimit(sentence)) },
  { name: 'text of 16 MiB', path: '/v1/completions', body: () => prompt(upToLimit(sentence)) },
  { name: 'text of 30 kB', path: '/tokenize', body: () => prompt(sentence.repeat(500)) },
  { name: 'a million token ids', path: '/v1/completions', body: () => `{"prompt":${ids(1_000_000)}}` },
  {
    name: '8 million token ids',
    path: '/v1/completions',
    body: () => `{"prompt":${ids(8_000_000, () => 9)}}`,
  },
  { name: 'a million token ids', path: '/detokenize', body: () => `{"tokens":${ids(1_000_000)}}` },
  { name: '8 million token ids', path: '/detokenize', body: () => `{"tokens":${ids(8_000_000, () => 9)}}` },
  { name: 'chat of 2,000 messages', path: '/v1/chat/completions', body: () => chat(2_000) },
  { name: 'chat of 100,000 messages', path: '/v1/chat/completions', body: () => chat(100_000) },
  {
    name: 'chat of 2,000 messages',
    path: '/tokenize',
    body: () => chat(2_000).replace(',"max_tokens":1', ''),
  },
  {
    name: 'junk nested 8 million deep',
    path: '/v1/completions',
    body: () => `{"x":${'['.repeat(8_000_000)}${']'.repeat(8_000_000)}}`,
  },
  {
    name: 'junk of 1.6 million objects',
    path: '/v1/completions',
    body: () => `{"x":[${upToLimit('{"a":[1]},')}0]}`,
  },
  {
    name: 'junk of 1.6 million objects',
    path: '/kv/release',
    body: () => `{"x":[${upToLimit('{"a":[1]},')}0]}`,
  },
  {
    name: 'junk in a field that is refused',
    path: '/v1/completions',
    body: () => `{"prompt":"a","tools":[${upToLimit('{"a":[1]},')}0]}`,
  },
  { name: 'broken JSON of 16 MiB', path: '/v1/completions', body: () => `{"x":[${upToLimit('{"a":[1]},')}` },
  {
    name: 'a million stop_token_ids',
    path: '/v1/completions',
    body: () => `{"prompt":"a","max_tokens":1,"stop_token_ids":${ids(1_000_000)}}`,
  },
  {
    name: '1,024 prompts of 2,000 ids',
    path: '/v1/completions',
    body: () => `{"prompt":${many(1_024, ids(2_000))},"max_tokens":1}`,
    leaveAfterMs: 2_000,
  },
  {
    name: '1,024 prompts, n 32',
    path: '/v1/completions',
    body: () => `{"prompt":${many(1_024, '"a"')},"n":32,"max_tokens":1}`,
    leaveAfterMs: 2_000,
  },
  {
    name: '2,000 ids echoed, 20 logprobs',
    path: '/v1/completions',
    body: () => `{"prompt":${ids(2_000)},"max_tokens":0,"echo":true,"logprobs":20}`,
  },
  {
    name: '2,000 ids echoed 32 times',
    path: '/v1/completions',
    body: () => `{"prompt":${ids(2_000)},"max_tokens":1,"echo":true,"n":32,"return_token_ids":true}`,
  },
];

/** No body at all: how steady the stream is on this machine, with the model's own steps. */
const IDLE: Case = { name: 'none', path: '', body: () => '' };

interface Options {
  readonly beside?: string;
  readonly tries: string;
  readonly only?: string;
  readonly hostile?: true;
  readonly proxy?: true;
  readonly url?: string;
  readonly json?: true;
}

interface Measured {
  readonly answer: string;
  readonly answeredMs: number;
  /** Longest time between two chunks of the stream. */
  readonly gapMs: number;
  /** Slowest GET /version. */
  readonly versionMs: number;
}

interface Row {
  readonly name: string;
  readonly path: string;
  readonly bytes: number;
  /** One per program measured. */
  readonly of: readonly Measured[];
}

async function main(): Promise<void> {
  const options = new Command('http-stalls')
    .description("measures how long one client's body holds up another client's stream")
    .option(
      '--beside <file>',
      'the pd-worker (with --proxy: pd-proxy) of another checkout, measured in turn with this one',
    )
    .option('--tries <n>', 'tries per body, of which the best counts', '5')
    .option('--only <word>', 'only bodies whose name or path contains this')
    .option('--hostile', 'bodies whose fields explode, nest or name what is not there')
    .option('--proxy', 'measure pd-proxy instead of pd-worker')
    .addOption(new Option('--url <url>', 'measure a server that runs').conflicts(['beside', 'proxy']))
    .option('--json', 'JSON on stdout')
    .allowExcessArguments(false)
    .parse()
    .opts<Options>();
  const program = options.proxy ? 'pd-proxy' : 'pd-worker';
  const files = [options.url ?? programFile(program)];
  if (options.beside !== undefined) files.unshift(options.beside);
  const start = options.proxy ? startProxy : startWorker;
  const workers = options.url === undefined ? await Promise.all(files.map(start)) : [running(options.url)];
  const urls = workers.map(({ url }) => url);
  const thrower = new Worker(new URL(import.meta.url));
  try {
    for (const url of urls) await timed(url, () => sleep(WARM_UP_MS));
    const rows = [await measure(urls, IDLE, thrower, Number(options.tries))];
    for (const one of options.hostile ? [...HOSTILE_BODIES, ...TAKEN_BODIES] : CASES) {
      if (options.only !== undefined && !`${one.path} ${one.name}`.includes(options.only)) continue;
      if ((options.proxy || options.url !== undefined) && !one.path.startsWith('/v1/')) continue;
      rows.push(await measure(urls, one, thrower, Number(options.tries)));
      if (!options.json) console.error(`${one.path} ${one.name}: done`);
    }
    const firstTokenMs = await firstTokens(urls);
    if (options.json)
      console.log(JSON.stringify({ machine: await readMachine(), files, rows, firstTokenMs }));
    else print(rows, firstTokenMs);
  } finally {
    await thrower.terminate();
    for (const { stop } of workers) await stop();
  }
}

function print(rows: readonly Row[], firstTokenMs: readonly Spread[]): void {
  const names = firstTokenMs.length > 1 ? ['before', 'now'] : ['now'];
  console.log(
    plainTable({
      head: [
        ...['body', 'to', 'MB'],
        ...names.flatMap((name) => [`${name}: answer`, 'after', 'longest gap', 'slowest /version']),
      ],
      rows: rows.map(({ name, path, bytes, of }) => [
        ...[name, path, bytes === 0 ? '' : (bytes / 1e6).toFixed(1)],
        ...of.flatMap(({ answer, answeredMs, gapMs, versionMs }) => [
          answer,
          ...[answeredMs, gapMs, versionMs].map(ms),
        ]),
      ]),
    }),
  );
  for (const [i, { p50, p90 }] of firstTokenMs.entries()) {
    console.log(
      `first token of a 16-token prompt, ${names[i]}: p50 ${p50.toFixed(2)} ms, p90 ${p90.toFixed(2)} ms`,
    );
  }
}

const ms = (value: number) => `${value.toFixed(value < 10 ? 1 : 0)} ms`;

/** A program under test. */
interface Measurable {
  readonly url: string;
  stop(): Promise<void>;
}

function running(url: string): Measurable {
  return { url, stop: async () => {} };
}

function startProxy(file: string): Promise<Measurable> {
  return startProxyPair(file, ['1', String(EVENT_EVERY_MS)]);
}

/** With small steps, as the cost of a prompt in the model is not what is measured. */
async function startWorker(file: string): Promise<Measurable> {
  const args = ['--port', '0', '--host', '127.0.0.1', '--device', 'host', '--max-num-batched-tokens', '16'];
  const child = spawn(process.execPath, [file, ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
  process.on('exit', () => child.kill('SIGKILL'));
  const timer = setTimeout(() => child.kill('SIGKILL'), START_MS);
  try {
    for await (const line of createInterface({ input: child.stdout })) {
      const url = /Running on (http:\/\/[\w.:[\]]+)/.exec(line)?.[1];
      if (url === undefined) continue;
      child.stdout.resume();
      const stop = async () => {
        child.kill('SIGTERM');
        await once(child, 'exit');
      };
      return { url, stop };
    }
    throw new Error(`${file} ended before it was ready`);
  } finally {
    clearTimeout(timer);
  }
}

/** Every worker in turn, `tries` times, and the best of each. What the worker causes shows in every try; what else the machine does need not. */
async function measure(urls: readonly string[], one: Case, thrower: Worker, tries: number): Promise<Row> {
  const body = new TextEncoder().encode(one.body());
  const all = urls.map((): Measured[] => []);
  for (let i = 0; i < tries; i++) {
    for (const [k, url] of urls.entries()) all[k]!.push(await throwAt(url, one, body, thrower));
  }
  const best = (list: readonly Measured[], of: (one: Measured) => number) => Math.min(...list.map(of));
  return {
    name: one.name,
    path: one.path,
    bytes: body.length,
    of: all.map((list) => ({
      answer: list[0]!.answer,
      answeredMs: best(list, (one) => one.answeredMs),
      gapMs: best(list, (one) => one.gapMs),
      versionMs: best(list, (one) => one.versionMs),
    })),
  };
}

async function throwAt(url: string, one: Case, body: Uint8Array, thrower: Worker): Promise<Measured> {
  let caught: Caught = { status: 0, ms: 0, code: '' };
  const gaps = await timed(url, async () => {
    await sleep(QUIET_MS);
    if (one === IDLE) await sleep(BASELINE_MS);
    else {
      const answer = once(thrower, 'message');
      const { path, leaveAfterMs } = one;
      const job: Throw = { url, path, body, ...(leaveAfterMs !== undefined && { leaveAfterMs }) };
      thrower.postMessage(job);
      caught = ((await answer) as [Caught])[0];
    }
    await sleep(QUIET_MS);
  });
  const { status, code, ms: answeredMs } = caught;
  const answer = one === IDLE ? '' : status === 0 ? 'left' : `${status} ${code}`.trim();
  return { answer, answeredMs, ...gaps };
}

/** The longest gap in a stream and the slowest GET /version while `during` ran. */
async function timed(
  url: string,
  during: () => Promise<void>,
): Promise<Pick<Measured, 'gapMs' | 'versionMs'>> {
  const agent = new Agent({ keepAlive: true });
  let over = false;
  let longest = 0;
  const watch = async () => {
    while (!over) {
      let last: number | undefined;
      await stream(url, agent, 2_000, () => {
        const now = monotonicMs();
        longest = Math.max(longest, now - (last ?? now));
        last = now;
        return over;
      });
    }
  };
  let slowest = 0;
  const probe = async () => {
    while (!over) {
      const began = monotonicMs();
      const get = httpRequest(new URL('/version', url), { agent });
      get.end();
      const [answer] = (await once(get, 'response')) as [IncomingMessage];
      answer.resume();
      await once(answer, 'end');
      slowest = Math.max(slowest, monotonicMs() - began);
      await sleep(PROBE_EVERY_MS);
    }
  };
  const running = Promise.all([watch(), probe()]);
  await during();
  over = true;
  await running;
  agent.destroy();
  return { gapMs: longest, versionMs: slowest };
}

/** Streams a completion until `onChunk` returns true. */
async function stream(url: string, agent: Agent, tokens: number, onChunk: () => boolean): Promise<void> {
  const post = httpRequest(new URL('/v1/completions', url), {
    method: 'POST',
    agent,
    headers: { 'content-type': 'application/json' },
  });
  post.on('error', () => {});
  post.end(
    JSON.stringify({ prompt: SIXTEEN, max_tokens: tokens, ignore_eos: true, stream: true, temperature: 0 }),
  );
  const [answer] = (await once(post, 'response')) as [IncomingMessage];
  for await (const _ of answer) {
    if (onChunk()) break;
  }
  post.destroy();
}

/** 16 tokens of the demo model. */
const SIXTEEN = 'What is the capital of France? What is the capital of Spain right now';

/** The workers take turns request by request, so that what else the machine does affects them alike. */
async function firstTokens(urls: readonly string[]): Promise<Spread[]> {
  const agent = new Agent({ keepAlive: true });
  const times = urls.map((): number[] => []);
  for (let i = 0; i < FIRST_TOKENS; i++) {
    for (const [k, url] of urls.entries()) {
      const began = monotonicMs();
      let first: number | undefined;
      await stream(url, agent, 2, () => {
        first ??= monotonicMs();
        return false;
      });
      if (i >= FIRST_TOKENS / 10) times[k]!.push(first! - began);
    }
  }
  agent.destroy();
  return times.map((list) => spreadOf(list)!);
}

if (isMainThread) await main();
else
  parentPort!.on('message', (job: Throw) => void send(job).then((caught) => parentPort!.postMessage(caught)));
