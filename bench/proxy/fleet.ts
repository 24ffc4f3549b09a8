/** A pd-proxy and instances without a model (backend.ts), each on cores of its own, for measuring the proxy alone. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { freePorts } from '../../src/net/free-ports.ts';
import { programFile } from '../../support/root.ts';
import { monotonicMs } from '../measure/machine.ts';
import { type Spread, spreadOf } from '../measure/statistics.ts';
import type { LoadPlan, LoadResult } from './load-plan.ts';

const START_MS = 30_000;
const STOP_MS = 5_000;
/** Beyond what a load is to take. */
const SLACK_MS = 30_000;
/** Of /proc: USER_HZ, which is 100 everywhere. */
const TICK_US = 10_000;

export interface FleetOptions {
  readonly proxyArgs: readonly string[];
  readonly pairs: number;
  readonly kind: 'ours' | 'vllm';
  /** Of a streamed answer. */
  readonly events: number;
  readonly paceMs?: number;
  readonly proxyCores: readonly number[];
  readonly backendCores: readonly number[];
}

export interface Fleet {
  /** Of the proxy. */
  readonly port: number;
  /** Of a consumer. */
  readonly instancePort: number;
  /** Of the proxy and all processes that it has started, microseconds. */
  cpuUs(): number;
  stop(): Promise<void>;
}

const children = new Set<ChildProcess>();
process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL');
});

/** `cores` empty: anywhere. `stdout` of a program is read where it is a pipe. */
export function startOn(
  cores: readonly number[],
  command: readonly string[],
  { stdout = 'ignore', env = process.env }: { stdout?: 'ignore' | 'pipe'; env?: NodeJS.ProcessEnv } = {},
): ChildProcess {
  const [file, ...args] = cores.length > 0 ? ['taskset', '-c', cores.join(','), ...command] : command;
  const child = spawn(file!, args, { stdio: ['pipe', stdout, 'inherit'], env });
  children.add(child);
  child.once('exit', () => children.delete(child));
  return child;
}

export async function stopAll(started: readonly ChildProcess[]): Promise<void> {
  const running = started.filter((child) => children.has(child));
  const ended = running.map((child) => once(child, 'exit'));
  for (const child of running) {
    child.stdin!.end();
    child.kill('SIGTERM');
  }
  const timer = setTimeout(() => {
    for (const child of running) child.kill('SIGKILL');
  }, STOP_MS);
  await Promise.all(ended);
  clearTimeout(timer);
}

/** Resolves once the proxy knows all instances. */
export async function startFleet(options: FleetOptions): Promise<Fleet> {
  const { proxyArgs, pairs, kind, events, paceMs = 0, proxyCores, backendCores } = options;
  const [port, discovery] = await freePorts(2, '127.0.0.1');
  const at = ['--host', '127.0.0.1', '--port', String(port), '--discovery-port', String(discovery)];
  const proxy = startOn(proxyCores, [
    process.execPath,
    programFile('pd-proxy'),
    ...at,
    ...['--log-format', 'json'],
    ...proxyArgs,
  ]);
  const started = [proxy];
  const file = fileURLToPath(new URL('./backend.js', import.meta.url));
  const backends = ['producer', 'consumer'].flatMap((role, r) =>
    Array.from({ length: pairs }, async (_, i) => {
      const more = [role, `127.0.0.1:${discovery}`, String(events), String(paceMs), kind];
      const core = backendCores[(i * 2 + r) % Math.max(1, backendCores.length)];
      const cores = core === undefined ? [] : [core];
      const child = startOn(cores, [process.execPath, file, ...more], { stdout: 'pipe' });
      started.push(child);
      return Number(await firstLine(child));
    }),
  );
  const ports = await Promise.all(backends);
  await untilListed(port!, pairs);
  return {
    port: port!,
    instancePort: ports.at(-1)!,
    cpuUs: () => cpuOf(proxy.pid!),
    stop: () => stopAll(started),
  };
}

async function firstLine(child: ChildProcess): Promise<string> {
  const timer = setTimeout(() => child.kill('SIGKILL'), START_MS);
  try {
    for await (const line of createInterface({ input: child.stdout! })) return line;
    throw new Error(`${child.spawnargs.join(' ')} ended before it was ready`);
  } finally {
    clearTimeout(timer);
  }
}

async function untilListed(port: number, pairs: number): Promise<void> {
  const deadline = monotonicMs() + START_MS;
  for (;;) {
    const health = await fetch(`http://127.0.0.1:${port}/health`).then(
      (answer) => answer.json() as Promise<{ counts: Record<string, number> }>,
      () => undefined,
    );
    if (health?.counts['producer'] === pairs && health.counts['consumer'] === pairs) return;
    if (monotonicMs() > deadline) throw new Error('the proxy does not list its instances');
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** User and system time of a process and its children that live, microseconds; taskset has become the program by then. */
function cpuOf(pid: number): number {
  let ticks = 0;
  const add = (id: number) => {
    const stat = readFileSync(`/proc/${id}/stat`, 'latin1');
    // After the name, which may hold anything: state is field 3, utime and stime 14 and 15.
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    ticks += Number(fields[11]) + Number(fields[12]);
    for (const task of readdirSync(`/proc/${id}/task`)) {
      const below = readFileSync(`/proc/${id}/task/${task}/children`, 'latin1').trim();
      if (below !== '') for (const child of below.split(' ')) add(Number(child));
    }
  };
  add(pid);
  return ticks * TICK_US;
}

/** Runs the load from as many processes as there are cores for it, each with its share of the connections. */
export async function load(
  plan: Omit<LoadPlan, 'seed'>,
  cores: readonly number[],
): Promise<Omit<LoadResult, 'latenciesMs'> & { readonly latencyMs: Spread }> {
  const file = fileURLToPath(new URL('./load.js', import.meta.url));
  const processes = Math.max(1, Math.min(cores.length, plan.connections));
  const results = await Promise.all(
    Array.from({ length: processes }, async (_, seed) => {
      const connections = share(plan.connections, processes, seed);
      const on = cores[seed] === undefined ? [] : [cores[seed]];
      const child = startOn(on, [process.execPath, file, JSON.stringify({ ...plan, connections, seed })], {
        stdout: 'pipe',
      });
      const timer = setTimeout(() => child.kill('SIGKILL'), plan.warmUpMs + plan.ms + SLACK_MS);
      let out = '';
      for await (const part of child.stdout!.setEncoding('utf8')) out += part;
      clearTimeout(timer);
      return JSON.parse(out) as LoadResult;
    }),
  );
  const latencyMs = spreadOf(results.flatMap(({ latenciesMs }) => latenciesMs));
  if (!latencyMs) throw new Error('not one answer');
  const sum = (of: (result: LoadResult) => number) => results.reduce((total, one) => total + of(one), 0);
  return {
    latencyMs,
    failed: sum(({ failed }) => failed),
    all: sum(({ all }) => all),
    perSecond: sum(({ perSecond }) => perSecond),
  };
}

function share(whole: number, parts: number, at: number): number {
  return Math.floor(whole / parts) + (at < whole % parts ? 1 : 0);
}
