/**
 * The runbook as written: the lines of docs/operations.md ("With vLLM's configuration"), run word for word by bash, and what its readers
 * check: health, four prompts, the metrics that show that KV moved, the lines of the logs.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { Command } from 'commander';
import { demoModelDir } from '../src/config/demo-model.ts';
import { freePorts } from '../src/net/free-ports.ts';
import { readKvShape } from '../support/kv-shape.ts';
import { ROOT } from '../support/root.ts';
import type { Addresses } from '../support/serving.ts';
import { Bootstraps } from './bootstraps.ts';
import { PROMPTS, runPrompt } from './demo-checks.ts';

const HEADING = "### With vLLM's configuration";
/** The ports in the lines. */
const PORTS = ['10002', '30002', '8081', '8082', '8083', '8084'] as const;
const START_TIMEOUT_MS = 120_000;
const STOP_TIMEOUT_MS = 20_000;
/** pd-worker's default, which the lines do not change. */
const BLOCK_SIZE = 16;

const options = new Command('runbook.sh')
  .description("Runs the runbook's three lines and checks what its readers check.")
  .option('--free-ports', 'replace the ports in the lines with free ones')
  .option('--verbose', 'print the log of every program')
  .allowExcessArguments(false)
  .parse()
  .opts<{ readonly freePorts?: true; readonly verbose?: true }>();

/** Proxy, producer, consumer: the first indented block after the heading, continued lines joined. */
function linesOfTheRunbook(): [proxy: string, producer: string, consumer: string] {
  const text = readFileSync(`${ROOT}docs/operations.md`, 'utf8');
  const section = text.slice(text.indexOf(`${HEADING}\n`));
  const block = /\n\n((?: {4}.*\n)+)/.exec(section)?.[1] ?? '';
  const lines = block.replaceAll(/^ {4}/gm, '').replaceAll('\\\n', ' ').trim().split('\n');
  const [proxy, producer, consumer, ...more] = lines;
  if (!proxy || !producer || !consumer || more.length > 0) {
    throw new Error(`docs/operations.md: the block after ${HEADING} is not three commands`);
  }
  return [proxy, producer, consumer];
}

/** One line of the runbook, run by bash. */
class Running {
  readonly name: string;
  readonly messages: string[] = [];
  readonly bootstraps: Bootstraps;
  readonly #child: ChildProcess;
  readonly #ended: Promise<unknown>;

  constructor(name: string, line: string, bootstraps: Bootstraps) {
    this.name = name;
    this.bootstraps = bootstraps;
    // Its own process group, so that it is stopped as a whole, including bash.
    this.#child = spawn('bash', ['-c', line], {
      cwd: ROOT,
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...bootstraps.environment },
    });
    this.#ended = once(this.#child, 'close');
    for (const stream of [this.#child.stdout!, this.#child.stderr!]) {
      createInterface({ input: stream }).on('line', (text) => this.#hear(text));
    }
  }

  /** The first match in its output. Throws, with the last lines, if it ends or the deadline passes before. */
  async said(pattern: RegExp): Promise<RegExpExecArray> {
    for (const deadline = performance.now() + START_TIMEOUT_MS; ; await sleep(20)) {
      for (const message of this.messages) {
        const match = pattern.exec(message);
        if (match) return match;
      }
      const ended = this.#child.exitCode !== null || this.#child.signalCode !== null;
      if (ended || performance.now() > deadline) {
        throw new Error(
          `the ${this.name} ${ended ? 'ended' : 'took too long'}:\n${this.messages.slice(-20).join('\n')}`,
        );
      }
    }
  }

  async stop(): Promise<void> {
    const timer = setTimeout(() => this.#signal('SIGKILL'), STOP_TIMEOUT_MS);
    this.#signal('SIGTERM');
    await this.#ended;
    clearTimeout(timer);
  }

  #signal(signal: NodeJS.Signals): void {
    try {
      process.kill(-this.#child.pid!, signal);
    } catch {
      // gone already
    }
  }

  #hear(text: string): void {
    this.bootstraps.hear(text, this.name);
    const json = text.startsWith('{') ? (JSON.parse(text) as { msg?: string }).msg : undefined;
    this.messages.push(json ?? text);
    if (options.verbose) console.log(`${this.name.padEnd(8)} | ${json ?? text}`);
  }
}

const rows: string[] = [];
let passed = 0;
let failed = 0;

/** One row of the table: what was observed, or why it failed. */
async function check(what: string, see: () => Promise<string> | string): Promise<void> {
  try {
    rows.push(`| ${what} | passed | ${await see()} |`);
    passed++;
  } catch (error) {
    failed++;
    rows.push(`| ${what} | FAILED | ${(error as Error).message.split('\n')[0]} |`);
    console.error(`runbook: ${what}: ${(error as Error).message}`);
  }
}

async function main(): Promise<number> {
  const lines = linesOfTheRunbook();
  const chosen = options.freePorts ? (await freePorts(PORTS.length, '0.0.0.0')).map(String) : PORTS;
  // All in one pass, since a new port may equal one that is still to be replaced.
  const within = (line: string) =>
    line.replaceAll(
      new RegExp(`\\b(?:${PORTS.join('|')})\\b`, 'g'),
      (port) => chosen[PORTS.indexOf(port as (typeof PORTS)[number])]!,
    );
  const bootstraps = new Bootstraps();
  const running = (['proxy', 'producer', 'consumer'] as const).map((name, i) => {
    const line = within(lines[i]!);
    console.log(line);
    return new Running(name, line, bootstraps);
  });
  const [proxy, producer, consumer] = running as [Running, Running, Running];
  try {
    const [proxyUrl, producerUrl, consumerUrl] = await Promise.all(
      running.map(async (program) => (await program.said(/Running on (http:\S+)/))[1]!),
    );
    const kvOf = async (worker: Running) => (await worker.said(/zmq_address:([^,]+),/))[1]!;
    const kv = { producer: await kvOf(producer), consumer: await kvOf(consumer) };
    const system: Addresses = {
      proxy: { url: proxyUrl!, discovery: '' },
      producers: [{ name: 'producer', url: producerUrl!, kv: kv.producer }],
      consumers: [{ name: 'consumer', url: consumerUrl!, kv: kv.consumer }],
    };

    for (const worker of [producer, consumer]) {
      await check(
        `the ${worker.name} says what it runs on`,
        async () => (await worker.said(/^Device: .*/))[0],
      );
    }
    await check('GET /health of each, two instances at the proxy', () => health(system));
    const onGpu = consumer.messages.some((message) => message.startsWith('Device: cuda'));
    const shape = readKvShape(demoModelDir(), onGpu ? 2 : 4, BLOCK_SIZE);
    for (const prompt of PROMPTS) {
      await check(JSON.stringify(prompt.prompt), async () => {
        const result = await runPrompt(prompt, 'demo', system, undefined, shape);
        if (result.problems.length > 0) throw new Error(result.problems.join('; '));
        return `${JSON.stringify(result.text)}, ${result.bytesMoved.toLocaleString('en')} bytes of KV moved`;
      });
    }
    await check('🤝 of the producer', async () => {
      const [line] = await producer.said(/^🤝.* Success, .*👉.*/);
      if (!line.includes(`${kv.producer}👉${kv.consumer}`)) throw new Error(line);
      return line;
    });
    await check('🤝 of the consumer', async () => {
      const [line] = await consumer.said(/^🤝.* Success, .*👈.*/);
      if (!line.includes(`${kv.consumer}👈${kv.producer}`)) throw new Error(line);
      return line;
    });
    if (onGpu) await check("NCCL's bootstrap", () => bootstraps.summary(hostOf(kv.producer)));
    await check('proxy', async () => (await proxy.said(/^handle_request count: .*/))[0]);
  } catch (error) {
    failed++;
    console.error(`runbook: ${(error as Error).message}`);
  } finally {
    for (const program of running) await program.stop();
  }
  console.log(`\n| check | | seen |\n|---|---|---|\n${rows.join('\n')}`);
  console.log(`\n${passed} passed, ${failed} failed`);
  return failed === 0 ? 0 : 1;
}

async function health({ proxy, producers, consumers }: Addresses): Promise<string> {
  for (const { url } of [...producers, ...consumers]) {
    const answer = await fetch(`${url}/health`);
    if (answer.status !== 200)
      throw new Error(`${url}/health answers ${answer.status}: ${await answer.text()}`);
  }
  for (const deadline = performance.now() + START_TIMEOUT_MS; ; await sleep(100)) {
    const answer = await (await fetch(`${proxy.url}/health`)).json();
    const { counts } = answer as { counts?: { producer?: number; consumer?: number } };
    if (counts?.producer === 1 && counts.consumer === 1) return 'one producer, one consumer';
    if (performance.now() > deadline) throw new Error(`${proxy.url}/health: ${JSON.stringify(answer)}`);
  }
}

const hostOf = (address: string) => address.replace(/:\d+$/, '').replace(/^\[(.*)\]$/, '$1');

process.exitCode = await main().catch((error: unknown) => {
  console.error(`runbook: ${(error as Error).message}`);
  return 1;
});
process.exit();
