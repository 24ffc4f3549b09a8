/**
 * The proxy alone: a producer and a consumer that answer at once, and a number of connections, each of which sends its next request when
 * the last is answered. The difference from the same load on one instance without a proxy is the cost of the proxy.
 *
 *   ./scripts/build.sh && node dist/bench/proxy/main.js [--connections 32] [--seconds 10] [--stream] [--json]
 *   taskset -c 0,1 node dist/bench/proxy/main.js     proxy, instances and load on two cores
 */
import { availableParallelism } from 'node:os';
import { Command } from 'commander';
import { Pool } from 'undici';
import { programFile } from '../../support/root.ts';
import { monotonicMs, readMachine } from '../measure/machine.ts';
import { type Spread, spreadOf } from '../measure/statistics.ts';
import { plainTable } from '../measure/table.ts';
import { startProxyPair } from './pair.ts';

const WARM_UP_SECONDS = 2;
/** Deadline of one request; none should come near it. */
const REQUEST_MS = 10_000;

interface Options {
  readonly connections: string;
  readonly seconds: string;
  readonly rounds: string;
  readonly stream?: true;
  readonly events: string;
  readonly json?: true;
}

const options = new Command('proxy')
  .description('requests per second through pd-proxy with instances that answer at once')
  .option('--connections <n>', 'requests in flight', '32')
  .option('--seconds <n>', 'length of a round', '10')
  .option('--rounds <n>', 'rounds, of which the fastest counts', '3')
  .option('--stream', 'streamed answers')
  .option('--events <n>', 'events per streamed answer', '16')
  .option('--json', 'JSON on stdout')
  .allowExcessArguments(false)
  .parse()
  .opts<Options>();

interface Round {
  readonly requestsPerSecond: number;
  readonly latencyMs: Spread;
  readonly failed: number;
}

async function round(url: string, seconds: number): Promise<Round> {
  const connections = Number(options.connections);
  const pool = new Pool(url, {
    connections,
    pipelining: 1,
    headersTimeout: REQUEST_MS,
    bodyTimeout: REQUEST_MS,
  });
  const body = JSON.stringify({
    ...{ model: 'm', prompt: 'What is the capital of France?', max_tokens: 16, temperature: 0 },
    ...(options.stream && { stream: true }),
  });
  const headers = { 'content-type': 'application/json' };
  const latencies: number[] = [];
  let failed = 0;
  const begin = monotonicMs();
  const lane = async (until: number, counts: boolean) => {
    while (monotonicMs() < until) {
      const sentAt = monotonicMs();
      const answer = await pool.request({ method: 'POST', path: '/v1/completions', headers, body });
      const text = await answer.body.text();
      if (!counts) continue;
      if (answer.statusCode === 200 && text.includes('"length"')) latencies.push(monotonicMs() - sentAt);
      else failed++;
    }
  };
  const lanes = (until: number, counts: boolean) =>
    Promise.all(Array.from({ length: connections }, () => lane(until, counts)));
  await lanes(begin + WARM_UP_SECONDS * 1_000, false);
  const from = monotonicMs();
  await lanes(from + seconds * 1_000, true);
  const took = monotonicMs() - from;
  await pool.close();
  return { requestsPerSecond: (latencies.length * 1_000) / took, latencyMs: spreadOf(latencies)!, failed };
}

async function fastest(url: string): Promise<Round> {
  const rounds: Round[] = [];
  for (let i = 0; i < Number(options.rounds); i++) rounds.push(await round(url, Number(options.seconds)));
  return rounds.reduce((best, one) => (one.requestsPerSecond > best.requestsPerSecond ? one : best));
}

const pair = await startProxyPair(programFile('pd-proxy'), [options.events]);
const machine = await readMachine();
const results = {
  'no proxy': await fastest(pair.instanceUrl),
  'pd-proxy': await fastest(pair.url),
};
await pair.stop();

const answers = options.stream ? `streamed answers of ${options.events} events` : 'whole answers';
if (options.json) {
  const cores = availableParallelism();
  console.log(
    JSON.stringify({ benchmark: 'proxy', machine, usableCores: cores, options, results }, undefined, 1),
  );
} else {
  const { program: version, node, cpu } = machine;
  console.log(`${version}, Node ${node}, ${availableParallelism()} cores to run on, ${cpu}`);
  console.log(
    `${options.connections} connections, ${answers}, the fastest of ${options.rounds} x ${options.seconds} s\n`,
  );
  const ms = (value: number) => value.toFixed(2);
  console.log(
    plainTable({
      head: ['', 'requests/s', 'mean ms', 'p50', 'p90', 'p99', 'failed'],
      rows: Object.entries(results).map(([name, { requestsPerSecond, latencyMs, failed }]) => [
        ...[name, requestsPerSecond.toFixed(0)],
        ...[latencyMs.mean, latencyMs.p50, latencyMs.p90, latencyMs.p99].map(ms),
        String(failed),
      ]),
    }),
  );
}
process.exitCode = Object.values(results).some(({ failed }) => failed > 0) ? 1 : 0;
