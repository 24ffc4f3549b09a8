/**
 * The native hand-over under faults, with real programs: `scripts/native-faults.sh` says what it does. A row for each scenario; the exit
 * status is 1 where one of them is not as it should be.
 *
 *   before   the consumer has asked, and its producer computes nothing for it
 *   while    the producer computes a long prompt chunk by chunk, and some of it is written
 *   after    all of it has been written and answered
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { Command, Option } from 'commander';
import type { WorkerState } from '../src/doctor/worker-state.ts';
import { parseHostPort } from '../src/net/address.ts';
import { proxyRequestId } from '../src/wire/ids.ts';
import { programFile } from '../support/root.ts';
import { metricsOf } from '../support/serving.ts';

const options = new Command('native-faults.sh')
  .addOption(new Option('--executor <name>').choices(['cuda', 'host']).default('cuda'))
  // cuda:0 where there is one GPU: the parts sockets and refused need two
  .addOption(new Option('--consumer-device <name>').default('cuda:1'))
  .addOption(new Option('--only <parts>').default('faults,one-gpu,sockets,refused'))
  .allowExcessArguments(false)
  .parse()
  .opts<{ readonly executor: string; readonly consumerDevice: string; readonly only: string }>();

const START_MS = 120_000;
const ANSWER_MS = 60_000;
const BOOKS_MS = 20_000;
const LOAD_TIMEOUT = '3s';
/** Steps of a long prompt, so that there is a while in which it is written. */
const CHUNK = 32;
const LONG_WORDS = 300;
/** A while is short on a fast GPU: it is tried again where it was missed. */
const TRIES = 8;

const COMMON = [
  ...['--executor', options.executor, '--host', '127.0.0.1', '--port', '0', '--kv-host', '127.0.0.1'],
  ...['--kv-port', '0', '--log-format', 'json', '--debug-state', '--wire', 'native', '--num-blocks', '1024'],
  ...[
    '--kv-load-timeout',
    LOAD_TIMEOUT,
    '--max-num-batched-tokens',
    String(CHUNK),
    '--kv-buffer-size',
    '256e6',
  ],
  ...(options.executor === 'cuda' ? ['--batch-invariant'] : []),
];

interface Worker {
  readonly child: ChildProcess;
  readonly url: string;
  /** Of its ROUTER; empty for an undivided one. */
  readonly kv: string;
}

const running = new Set<ChildProcess>();
let failures = 0;
let began = performance.now();

function row(name: string, said: string, ok: boolean): void {
  if (!ok) failures++;
  const seconds = ((performance.now() - began) / 1_000).toFixed(1);
  console.log(`${ok ? '  ' : 'X '}${name.padEnd(58)} ${said} (${seconds} s)`);
  began = performance.now();
}

async function start(
  role: 'producer' | 'consumer' | 'both',
  device: string,
  args: readonly string[] = [],
  env: NodeJS.ProcessEnv = {},
): Promise<Worker> {
  const all = [programFile('pd-worker'), '--role', role, '--device', device, ...COMMON, ...args];
  const child = spawn(process.execPath, all, {
    stdio: ['ignore', 'pipe', 'inherit'],
    env: { ...process.env, ...env },
  });
  running.add(child);
  child.once('exit', () => running.delete(child));
  let [url, kv, last] = ['', '', ''];
  const lines = createInterface({ input: child.stdout! });
  const ready = new Promise<void>((resolve) => {
    lines.on('line', (line) => {
      last = line;
      url ||= /Running on (http:\/\/[^\s"]+)/.exec(line)?.[1] ?? '';
      kv ||= /zmq_address:([^,]+),/.exec(line)?.[1] ?? '';
      if (url && (kv || role === 'both')) resolve();
    });
  });
  const ended = once(child, 'exit').then(() => {
    throw new Error(`the ${role} ended at its start: ${last}`);
  });
  ended.catch(() => undefined);
  await Promise.race([ready, ended, late(START_MS, `the ${role} to serve`)]);
  return { child, url, kv };
}

async function late(ms: number, what: string): Promise<never> {
  await sleep(ms, undefined, { ref: false });
  throw new Error(`waited ${ms / 1_000} s for ${what}`);
}

async function kill({ child }: Worker): Promise<void> {
  const ended = once(child, 'exit');
  child.kill('SIGKILL');
  await ended;
}

const idOf = (producer: Worker, consumer: Worker) =>
  proxyRequestId(parseHostPort(producer.kv), parseHostPort(consumer.kv), randomBytes(16).toString('hex'));

/** Different from its first block on each time. */
const promptOf = (words: number) =>
  `${randomBytes(6).toString('hex')}: ${Array.from({ length: words }, (_, i) => ['a', 'dragon', 'the', 'who'][i % 4]).join(' ')}`;

async function ask({ url }: Worker, id: string, prompt: string, maxTokens = 6): Promise<string> {
  const response = await fetch(`${url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'x-request-id': id, 'x-pd-wire': 'native' },
    body: JSON.stringify({ model: 'demo', prompt, max_tokens: maxTokens, temperature: 0 }),
    signal: AbortSignal.timeout(ANSWER_MS),
  });
  const { choices, error } = (await response.json()) as {
    choices?: { text: string }[];
    error?: { message: string };
  };
  return choices?.[0]?.text ?? `error: ${error?.message}`;
}

async function stateOf({ url }: Worker): Promise<WorkerState['core']> {
  const response = await fetch(`${url}/debug/state`, { signal: AbortSignal.timeout(ANSWER_MS) });
  return ((await response.json()) as WorkerState).core;
}
const grantsOf = async (worker: Worker) => (await stateOf(worker)).handOver!.grants;

/** In words, what is not at zero; undefined once all is. */
async function books(...workers: readonly Worker[]): Promise<string | undefined> {
  let wrong = '';
  for (const end = performance.now() + BOOKS_MS; performance.now() < end; await sleep(50)) {
    const all = await Promise.all(workers.map(stateOf));
    wrong = all
      .map(({ blocks, handOver, integrity }) => {
        const { wants, grants } = handOver!;
        const open = [blocks.used, wants.waiting, wants.quarantined, grants.requests, grants.launches];
        return [...(integrity ?? []), ...(open.some((count) => count > 0) ? [open.join('/')] : [])].join(
          '; ',
        );
      })
      .filter((words) => words !== '')
      .join(' | ');
    if (wrong === '') return undefined;
  }
  return `books not at zero: ${wrong}`;
}

/** Polls until it holds; false where `unless` settles first. */
async function until(holds: () => Promise<boolean>, unless: Promise<unknown>): Promise<boolean> {
  let over = false;
  void unless.then(
    () => {
      over = true;
    },
    () => {
      over = true;
    },
  );
  while (!over) if (await holds()) return true;
  return false;
}

let undivided: Worker;
const whole = (prompt: string) => ask(undivided, 'reference', prompt);

interface Pair {
  producer: Worker;
  consumer: Worker;
}
const ENDS = ['producer', 'consumer'] as const satisfies readonly (keyof Pair)[];
const DEVICES: Record<keyof Pair, string> = { producer: 'cuda:0', consumer: options.consumerDevice };

/** A request by the pair, right and by KV that was loaded. */
async function works({ producer, consumer }: Pair): Promise<string | undefined> {
  const prompt = promptOf(40);
  const before = (await metricsOf(consumer.url)).get('pd_kv_loads_total{result="ok"}') ?? 0;
  const id = idOf(producer, consumer);
  const [, text] = await Promise.all([ask(producer, id, prompt, 1), ask(consumer, id, prompt)]);
  const loaded = ((await metricsOf(consumer.url)).get('pd_kv_loads_total{result="ok"}') ?? 0) - before;
  if (text !== (await whole(prompt))) return `another text: ${text}`;
  return loaded === 1 ? undefined : 'its KV did not come';
}

const MOMENTS = ['before', 'while', 'after'] as const;
type When = (typeof MOMENTS)[number];

/** Signals the victims at that moment of a request. Its prompt and answer, and whether the moment was met. */
async function signalled(pair: Pair, victims: readonly (keyof Pair)[], when: When, signal: NodeJS.Signals) {
  const { producer, consumer } = pair;
  for (let tries = 1; ; tries++) {
    const prompt = promptOf(LONG_WORDS);
    const id = idOf(producer, consumer);
    const answer = ask(consumer, id, prompt).catch((error: Error) => `broken: ${error.message}`);
    let met = true;
    if (when === 'before') met = await until(async () => (await grantsOf(producer)).unbound > 0, answer);
    else {
      const prefill = ask(producer, id, prompt, 1).catch((error: Error) => `broken: ${error.message}`);
      if (when === 'while') met = await until(async () => (await grantsOf(producer)).writing > 0, answer);
      else await Promise.all([answer, prefill]);
    }
    if (!met && tries < TRIES) continue;
    for (const victim of victims) pair[victim].child.kill(signal);
    return { prompt, answer, met };
  }
}

async function stopped(pair: Pair, victim: keyof Pair, when: When): Promise<void> {
  const name = `SIGSTOP of the ${victim} ${when} writes, then SIGCONT`;
  const { prompt, answer, met } = await signalled(pair, [victim], when, 'SIGSTOP');
  const other = victim === 'producer' ? pair.consumer : pair.producer;
  let quarantined = 0;
  if (victim === 'producer') {
    await answer;
    quarantined = (await stateOf(other)).handOver!.wants.quarantined;
    // what it may still write to must be nobody's: others' text would change
    const others = promptOf(LONG_WORDS);
    const text = await ask(other, idOf(pair.producer, pair.consumer), others);
    if (text !== (await whole(others))) row(name, `another's text changed: ${text}`, false);
  } else await sleep(when === 'after' ? 200 : 4_000);
  pair[victim].child.kill('SIGCONT');
  const text = await answer;
  const right = text === (await whole(prompt));
  const left = await books(pair.producer, pair.consumer);
  const after = await works(pair);
  const said = [
    `${met ? '' : 'moment missed, '}${quarantined} blocks in quarantine`,
    right ? '' : text,
    left,
    after,
  ];
  row(name, said.filter(Boolean).join('; '), right && met && !left && !after);
}

async function killed(pair: Pair, victim: keyof Pair, when: When): Promise<void> {
  const name = `kill -9 of the ${victim} ${when} writes`;
  const { prompt, answer, met } = await signalled(pair, [victim], when, 'SIGKILL');
  const survivor = victim === 'producer' ? pair.consumer : pair.producer;
  const text = await answer;
  const right = victim === 'consumer' || text === (await whole(prompt));
  // a consumer's death is seen by its socket: what it had asked for ends then, other KV at its lease's end
  const left = (await books(survivor)) ?? (await mapped(survivor));
  // in the memory of its predecessor, which the survivor must have unmapped
  pair[victim] = await start(victim, DEVICES[victim], DIRECT);
  const after = await works(pair);
  const said = [met ? 'met' : 'moment missed', right ? '' : text, left, after && `its successor: ${after}`];
  row(name, said.filter(Boolean).join('; '), right && met && !left && !after);
}

/** In words, whose cache it still has mapped, or who has its; undefined once nobody. */
async function mapped(worker: Worker): Promise<string | undefined> {
  let peers: readonly string[] = [];
  for (const end = performance.now() + BOOKS_MS; performance.now() < end; await sleep(50)) {
    peers = (await stateOf(worker)).handOver!.mappings.map(({ peer, cache }) => `${cache} with ${peer}`);
    if (peers.length === 0) return undefined;
  }
  return `still mapped: ${peers.join(', ')}`;
}

/** Both ends, and their successors at the same addresses: what the dead had under way is nobody's, also not a bystander's on that GPU. */
async function killedTogether(pair: Pair, when: When): Promise<void> {
  const witness = promptOf(LONG_WORDS);
  const expected = await whole(witness);
  const { answer, met } = await signalled(pair, ENDS, when, 'SIGKILL');
  await answer;
  await Promise.all(
    ENDS.map(async (end) => {
      const { child, kv } = pair[end];
      if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
      const { port } = parseHostPort(kv);
      pair[end] = await start(end, DEVICES[end], [...DIRECT, '--kv-port', String(port)]);
    }),
  );
  const after = await works(pair);
  const left = await books(pair.producer, pair.consumer);
  // its KV of that prompt lies there since before
  const text = await whole(witness);
  const said = [
    met ? 'met' : 'moment missed',
    after && `their successors: ${after}`,
    left,
    text === expected ? '' : `a bystander's text changed: ${text}`,
  ];
  const right = met && !after && !left && text === expected;
  row(`kill -9 of both ends ${when} writes`, said.filter(Boolean).join('; '), right);
}

const DIRECT = ['--transport', 'direct', '--kv-orphan-timeout', '3s'];

async function faults(): Promise<void> {
  const [producer, consumer] = await Promise.all([
    start('producer', 'cuda:0', DIRECT),
    start('consumer', DEVICES.consumer, DIRECT),
  ]);
  const pair = { producer, consumer };
  const first = await works(pair);
  row('a pair by direct', first ?? 'right', first === undefined);
  await selfTest(
    pair.producer,
    DEVICES.consumer === DEVICES.producer ? 'within one GPU' : 'between two GPUs',
  );
  for (const victim of ENDS) for (const when of MOMENTS) await stopped(pair, victim, when);
  for (const victim of ENDS) for (const when of MOMENTS) await killed(pair, victim, when);
  for (const when of MOMENTS) await killedTogether(pair, when);
  await Promise.all([kill(pair.consumer), kill(pair.producer)]);
}

/** What the producer says of its path, once it has had time for it. */
async function selfTest(producer: Worker, where: string): Promise<void> {
  for (let i = 0; i < 100; i++, await sleep(100)) {
    const path = (await stateOf(producer)).handOver?.mappings.find(({ cache }) => cache === 'theirs')?.path;
    if (path === undefined || path.state === 'waiting') continue;
    if (path.state === 'not measured') return row(`the path ${where}`, `not measured: ${path.why}`, false);
    const { bytesPerSecond, expectedBytesPerSecond: expected, latencySeconds, link } = path;
    const gb = (rate: number) => `${(rate / 1e9).toFixed(1)} GB/s`;
    const should = expected === undefined ? 'nothing known of the link' : `about ${gb(expected)} expected`;
    const text = `${gb(bytesPerSecond)} over ${link}, ${should}, ${(latencySeconds * 1e3).toFixed(3)} ms for a block`;
    return row(`the path ${where}`, text, expected === undefined || bytesPerSecond >= expected / 2);
  }
  row(`the path ${where}`, 'was not tested within 10 s', false);
}

async function oneGpu(): Promise<void> {
  const own = ['--json', '--free-ports', '--device', 'cuda:0', '--executor', options.executor];
  const flags = [
    '--debug-state',
    '--num-blocks',
    '1024',
    ...(options.executor === 'cuda' ? ['--batch-invariant'] : []),
  ];
  const child = spawn(process.execPath, [programFile('pd-launch'), ...own, '--', ...flags], {
    stdio: ['ignore', 'pipe', 'ignore'],
  });
  running.add(child);
  const ended = once(child, 'exit');
  void ended.then(() => running.delete(child));
  const line = await Promise.race([
    once(createInterface({ input: child.stdout }), 'line'),
    ended.then(() => Promise.reject(new Error('pd-launch ended'))),
    late(START_MS, 'pd-launch'),
  ]);
  const system = JSON.parse(String(line[0])) as Record<'producers' | 'consumers', { url: string }[]> & {
    proxy: { url: string };
  };
  const [producer, consumer] = [system.producers[0]!, system.consumers[0]!];
  let wrong = 0;
  for (let i = 0; i < 8; i++) {
    const prompt = promptOf(20 + 30 * i);
    const text = await ask({ ...undivided, url: system.proxy.url }, randomBytes(8).toString('hex'), prompt);
    if (text !== (await whole(prompt))) wrong++;
  }
  const metrics = await metricsOf(consumer.url);
  const direct = metrics.get('pd_native_connections{transport="direct"}');
  const loaded = metrics.get('pd_kv_loads_total{result="ok"}');
  const said = `${8 - wrong} of 8 right, ${loaded} loaded, ${direct} connection by direct`;
  row('pd-launch --device cuda:0', said, wrong === 0 && direct === 1 && loaded === 8);
  await selfTest({ ...undivided, url: producer.url }, 'within one GPU');
  child.kill('SIGTERM');
  await ended;
}

async function another(
  name: string,
  args: readonly string[],
  env: NodeJS.ProcessEnv,
  envOfProducer: NodeJS.ProcessEnv = {},
): Promise<void> {
  const [producer, consumer] = await Promise.all([
    start('producer', 'cuda:0', args, { ...env, ...envOfProducer }),
    start('consumer', DEVICES.consumer, args, env),
  ]);
  const pair = { producer, consumer };
  const problems: string[] = [];
  for (let i = 0; i < 3; i++) problems.push((await works(pair)) ?? '');
  const left = await books(producer, consumer);
  const [connection] = (await stateOf(consumer)).handOver!.producers;
  const why = connection?.fallback && `, as ${connection.fallback.reason}: ${connection.fallback.why}`;
  const wrong = problems.filter(Boolean);
  const said = [`by ${connection?.transport}${why ?? ''}`, ...wrong, left].filter(Boolean).join('; ');
  row(name, said, wrong.length === 0 && !left && connection?.transport === 'nccl');
  await Promise.all([kill(consumer), kill(producer)]);
}

const PARTS: Record<string, () => Promise<void>> = {
  faults,
  'one-gpu': oneGpu,
  sockets: () =>
    another('NCCL over sockets', ['--transport', 'nccl'], { NCCL_P2P_DISABLE: '1', NCCL_SHM_DISABLE: '1' }),
  // no socket can be made there
  refused: () =>
    another(
      'direct that one end cannot open',
      ['--transport', 'auto'],
      {},
      { XDG_RUNTIME_DIR: '/proc/none' },
    ),
};

try {
  undivided = await start('both', 'cuda:0');
  const wanted = options.only.split(',');
  for (const [name, part] of Object.entries(PARTS)) {
    if (!wanted.includes(name)) continue;
    await part().catch((error: Error) => row(name, error.message, false));
  }
} finally {
  for (const child of running) child.kill('SIGKILL');
}
console.log(
  failures === 0 ? 'native-faults: all as it should be' : `native-faults: ${failures} rows are not`,
);
process.exit(failures === 0 ? 0 : 1);
