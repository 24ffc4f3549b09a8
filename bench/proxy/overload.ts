/**
 * What a proxy with limits makes of more requests than its instances can serve. Instances have a fixed service time and so many places; what
 * is too much for them waits there. Requests come at their own pace, whatever becomes of those before. Goodput is of answers in time.
 *
 *   ./scripts/build.sh && node dist/bench/proxy/overload.js [--seconds 10] [--json]
 */
import { once } from 'node:events';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { Agent, request } from 'undici';
import { Dealer } from 'zeromq';
import { encodePing } from '../../src/wire/codec.ts';
import { programFile } from '../../support/root.ts';
import { monotonicMs, readMachine } from '../measure/machine.ts';
import { spreadOf } from '../measure/statistics.ts';
import { markdownTable } from '../measure/table.ts';
import { linesOf, startProgram, stopProgram } from './programs.ts';

const { values: options } = parseArgs({
  options: {
    seconds: { type: 'string', default: '10' },
    json: { type: 'boolean', default: false },
  },
});

const HOST = '127.0.0.1';
const CONSUMERS = 2;
/** Of each. */
const PLACES = 8;
const SERVICE_MS = 100;
const CAPACITY = (CONSUMERS * PLACES * 1_000) / SERVICE_MS;
/** An answer that comes later is of no use. */
const IN_TIME_MS = 1_000;
/** A quarter more than there are places, so that none is free while HTTP is under way, and a queue that is served within three service times. */
const LIMITS = [
  '--max-running',
  String(CONSUMERS * PLACES * 1.25),
  '--max-queued',
  String(CONSUMERS * PLACES * 3),
];
/** Under half the capacity, before anything counts: code gets hot. */
const WARM_UP_SECONDS = 3;
const PING_MS = 1_000;

/** Prompts take no time; answers take theirs. */
async function startInstance(role: 'producer' | 'consumer', discovery: string): Promise<() => void> {
  let free = PLACES;
  const waiting: (() => void)[] = [];
  const server = createServer((asked, out) => {
    asked.resume().once('end', async () => {
      if (role === 'consumer' && asked.method === 'POST') {
        if (free === 0) await new Promise<void>((resolve) => waiting.push(resolve));
        else free--;
        // One whose client has gone takes no place.
        if (!out.destroyed) await sleep(SERVICE_MS);
        const next = waiting.shift();
        if (next) next();
        else free++;
      }
      out.writeHead(200, { 'content-type': 'application/json' }).end('{"choices":[]}');
    });
  });
  server.listen(0, HOST);
  await once(server, 'listening');
  const address = `${HOST}:${(server.address() as AddressInfo).port}`;
  const dealer = new Dealer({ routingId: address, linger: 0, sendTimeout: 0 });
  dealer.connect(`tcp://${discovery}`);
  const type = role === 'producer' ? 'P' : 'D';
  const body = encodePing({ type, http_address: address, zmq_address: address });
  const ping = () => void dealer.send(body).catch(() => {});
  ping();
  const timer = setInterval(ping, PING_MS);
  return () => {
    clearInterval(timer);
    dealer.close();
    server.close();
    server.closeAllConnections();
  };
}

interface Outcome {
  readonly status: number;
  readonly ms: number;
}

async function load(url: string, perSecond: number, seconds: number): Promise<Outcome[]> {
  const agent = new Agent({ connections: 4_096, pipelining: 1 });
  const body = JSON.stringify({ model: 'm', prompt: 'What is the capital of France?', max_tokens: 16 });
  const ask = async (): Promise<Outcome> => {
    const begin = monotonicMs();
    try {
      const signal = AbortSignal.timeout(2 * IN_TIME_MS);
      const answer = await request(`${url}/v1/completions`, {
        method: 'POST',
        body,
        dispatcher: agent,
        signal,
      });
      await answer.body.dump();
      return { status: answer.statusCode, ms: monotonicMs() - begin };
    } catch {
      return { status: 0, ms: monotonicMs() - begin };
    }
  };
  const all: Promise<Outcome>[] = [];
  const begin = monotonicMs();
  const count = perSecond * seconds;
  for (let at = 0; at < count; at++) {
    const dueMs = begin + (at * 1_000) / perSecond - monotonicMs();
    if (dueMs > 0) await sleep(dueMs);
    all.push(ask());
  }
  const outcomes = await Promise.all(all);
  await agent.destroy();
  return outcomes;
}

interface Result {
  readonly load: string;
  readonly limited: boolean;
  readonly offered: number;
  readonly goodput: number;
  readonly late: number;
  readonly turnedAway: number;
  readonly refusalMs: { readonly p50: number; readonly p99: number } | undefined;
}

async function measure(times: number, limits: readonly string[]): Promise<Result> {
  const at = ['--host', HOST, '--port', '0', '--discovery-port', '0', '--log-format', 'json'];
  const proxy = startProgram(programFile('pd-proxy'), [...at, '--health-interval', '0', ...limits]);
  const said = [/Discovery on tcp:\/\/([^"\s]+)/, /Running on ([^"\s]+)/];
  const [discovery, url] = await linesOf(proxy, said);
  const stops = await Promise.all(
    (['producer', ...Array.from({ length: CONSUMERS }, () => 'consumer' as const)] as const).map((role) =>
      startInstance(role, discovery!),
    ),
  );
  try {
    for (;;) {
      const { instances } = (await (await fetch(`${url}/health`)).json()) as { instances: unknown[] };
      if (instances.length === CONSUMERS + 1) break;
      await sleep(50);
    }
    const seconds = Number(options.seconds);
    await load(url!, CAPACITY / 2, WARM_UP_SECONDS);
    const outcomes = await load(url!, times * CAPACITY, seconds);
    const refused = spreadOf(outcomes.filter(({ status }) => status === 429).map(({ ms }) => ms));
    const good = outcomes.filter(({ status, ms }) => status === 200 && ms <= IN_TIME_MS).length;
    const turnedAway = refused?.count ?? 0;
    return {
      load: `${times} x capacity`,
      limited: limits.length > 0,
      offered: outcomes.length / seconds,
      goodput: good / seconds,
      late: (outcomes.length - good - turnedAway) / seconds,
      turnedAway: turnedAway / seconds,
      refusalMs: refused && { p50: refused.p50, p99: refused.p99 },
    };
  } finally {
    for (const stop of stops) stop();
    await stopProgram(proxy);
  }
}

const results: Result[] = [];
for (const [times, limits] of [
  [0.5, LIMITS],
  [1, LIMITS],
  [1.5, LIMITS],
  [3, LIMITS],
  [3, []],
] as const) {
  results.push(await measure(times, limits));
}
if (options.json) {
  process.stdout.write(`${JSON.stringify({ capacity: CAPACITY, results })}\n`);
} else {
  const { cpu, cores } = await readMachine();
  const best = Math.max(...results.map(({ goodput }) => goodput));
  process.stdout.write(
    `${CONSUMERS} consumers of ${PLACES} places and ${SERVICE_MS} ms: ${CAPACITY} requests/s; in time: ${IN_TIME_MS} ms; ` +
      `${LIMITS.join(' ')} (${cpu}, ${cores} cores)\n\n`,
  );
  const head = ['load', 'limits', 'offered/s', 'in time/s', 'of the best', 'late or failed/s', '429/s'];
  const rows = results.map(({ load, limited, offered, goodput, late, turnedAway, refusalMs }) => [
    load,
    limited ? 'yes' : 'no',
    offered.toFixed(0),
    goodput.toFixed(0),
    `${((100 * goodput) / best).toFixed(0)}%`,
    late.toFixed(0),
    turnedAway.toFixed(0),
    refusalMs ? refusalMs.p50.toFixed(1) : '-',
    refusalMs ? refusalMs.p99.toFixed(1) : '-',
  ]);
  process.stdout.write(`${markdownTable({ head: [...head, '429 p50 ms', '429 p99 ms'], rows })}\n`);
}
process.exit(0);
