/**
 * Demonstrates that KV really moves: one proxy, one producer and one consumer, beside them one undivided worker, and four prompts.
 * Each must give the undivided worker's text, and the consumer's metrics must show that it loaded the prompt's KV and computed one token.
 * On GPUs it also shows which address NCCL's bootstrap used.
 */
import { existsSync } from 'node:fs';
import { isIPv6 } from 'node:net';
import { join } from 'node:path';
import { Command, Option } from 'commander';
import { Supervisor } from '../src/cli/launch-supervisor.ts';
import { demoModelDir } from '../src/config/demo-model.ts';
import { isLoopback } from '../src/net/address.ts';
import { ownAddresses } from '../src/net/local.ts';
import { readKvShape } from '../support/kv-shape.ts';
import { programFile } from '../support/root.ts';
import type { Addresses } from '../support/serving.ts';
import { Bootstraps } from './bootstraps.ts';
import { PROMPTS, runPrompt } from './demo-checks.ts';

const BLOCK_SIZE = 16;
/**
 * For workers that compute on GPUs. Two of them share the first GPU, and each would take all of it for KV blocks; this many are far more
 * than the prompts need, and take 4 GiB with an 8B model. Texts must be equal, though the pair computes the last token in another batch.
 */
const SHARING_A_GPU = ['--num-blocks', '2048', '--batch-invariant'];
const START_TIMEOUT_MS = 300_000;
const STOP_TIMEOUT_MS = 20_000;
/** The width of pd-launch's labels. */
const LABEL_WIDTH = 'consumer-0'.length;

interface DemoOptions {
  readonly keep?: true;
  readonly host: readonly string[];
  readonly sendType: string;
  readonly device: string;
  readonly executor?: string;
  readonly model?: string;
  readonly freePorts?: true;
  readonly runbookPorts?: true;
  readonly verbose?: true;
}

const options = new Command(process.env['SCRIPT_NAME'] ?? 'demo.sh')
  .description(
    'Starts a proxy, a producer and a consumer, sends four prompts through them, and checks that KV moved.',
  )
  .option('--keep', "leave it serving on the runbook's ports until Ctrl-C")
  .option('--free-ports', 'with --keep, any free ports instead')
  .option('--runbook-ports', "use the runbook's ports even without --keep")
  .option(
    '--host <address...>',
    "address of this machine to bind to; several are tried in turn; ipv6: this machine's own, not loopback",
    ['127.0.0.1'],
  )
  .addOption(
    new Option('--send-type <type>', 'how KV moves')
      .choices(['PUT', 'PUT_ASYNC', 'GET'])
      .default('PUT_ASYNC'),
  )
  .addOption(
    new Option('--device <device>', 'cuda: a GPU each')
      .choices(['host', 'cuda'])
      .default('host', 'host; two-gpu.sh: cuda'),
  )
  .addOption(
    new Option('--executor <executor>', 'where the model computes (default: on the device)').choices([
      'host',
      'cuda',
    ]),
  )
  .option('--model <dir>', 'checkpoint directory (default: the bundled demo model)')
  .option('--verbose', 'print the log of every program')
  .allowExcessArguments(false)
  .parse()
  .opts<DemoOptions>();

const onGpu = (options.executor ?? options.device) === 'cuda';
const given = (flag: string, value: string | undefined) => (value === undefined ? [] : [flag, value]);
const onRunbookPorts = (options.keep === true || options.runbookPorts === true) && options.freePorts !== true;
const workerArgs = ['--block-size', String(BLOCK_SIZE), ...(onGpu ? SHARING_A_GPU : [])];

const launchArgs = (host: string) => [
  ...['--json', '--host', host, '--device', options.device, '--send-type', options.sendType],
  ...['--kv-load-failure', 'fail'],
  ...given('--executor', options.executor),
  ...given('--model', options.model),
  ...(onRunbookPorts ? [] : ['--free-ports']),
  ...['--', ...workerArgs],
];
const undividedArgs = (host: string) => [
  ...['--role', 'both', '--host', host, '--port', '0', ...workerArgs],
  ...['--device', options.device === 'cuda' ? 'cuda:0' : options.device],
  ...given('--executor', options.executor),
  ...given('--model', options.model),
  ...['--log-format', 'pretty'],
];

/** The first signal stops all, the second kills. */
let stopSignal: NodeJS.Signals | undefined;
let supervisor: Supervisor | undefined;
const signalled = new Promise<void>((resolve) => {
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.on(signal, () => {
      if (stopSignal) supervisor?.kill();
      stopSignal ??= signal;
      resolve();
    });
  }
});

/** A system on one address, from start to stop. */
class Demonstration {
  readonly bootstraps = new Bootstraps();
  readonly #host: string;
  #system: Addresses | undefined;
  #undividedUrl: string | undefined;
  #printing = options.verbose === true;

  constructor(host: string) {
    this.#host = host;
  }

  /** How many prompts passed and failed; undefined if a signal came first. Throws if a program does not start or does not last. */
  async run(): Promise<{ readonly passed: number; readonly failed: number } | undefined> {
    console.log(
      `Starting a proxy, a producer and a consumer (${options.device}, ${this.#host}), and an undivided worker beside them`,
    );
    const running = new Supervisor({
      groups: [
        [
          {
            name: 'launch',
            args: [programFile('pd-launch'), ...launchArgs(this.#host)],
            env: options.device === 'host' ? {} : this.bootstraps.environment,
          },
        ],
        [{ name: 'undivided', args: [programFile('pd-worker'), ...undividedArgs(this.#host)] }],
      ],
      // Any program that ends here is a failure, as pd-launch restarts what dies.
      restart: { firstPauseMs: 0, maxPauseMs: 0, deaths: 1, windowMs: 1 },
      killAfterMs: STOP_TIMEOUT_MS,
      onLine: (name, line) => this.#hear(name, line),
      say: () => {},
    });
    supervisor = running;
    try {
      running.start();
      const ready = running.untilReady(
        async () => this.#system !== undefined && this.#undividedUrl !== undefined,
        START_TIMEOUT_MS,
      );
      await Promise.race([ready, signalled]);
      if (stopSignal || !this.#system || !this.#undividedUrl) return undefined;
      const { proxy, producers, consumers } = this.#system;
      console.log(`  proxy      ${proxy.url}, discovery ${proxy.discovery}`);
      for (const { url, kv } of producers) console.log(`  producer   ${url}, KV ${kv}`);
      for (const { url, kv } of consumers) console.log(`  consumer   ${url}, KV ${kv}`);
      console.log(`  undivided  ${this.#undividedUrl}`);
      const counts = await Promise.race([runAll(this.#system, this.#undividedUrl), signalled]);
      if (!counts) return undefined;
      if (options.keep && counts.failed === 0) await this.#serve(running, proxy.url, counts.passed);
      return counts;
    } finally {
      await running.stop();
    }
  }

  async #serve(running: Supervisor, url: string, passed: number): Promise<void> {
    console.log(
      `\n${passed} passed, 0 failed\n\nServing on ${url} (model ids: GET /v1/models). Stop with Ctrl-C, or: kill ${process.pid}`,
    );
    this.#printing = true;
    const failure = await Promise.race([signalled, running.failed]);
    if (failure) throw failure;
  }

  #hear(name: string, line: string): void {
    this.bootstraps.hear(line);
    if (name === 'launch' && line.startsWith('{"proxy"')) this.#system = JSON.parse(line) as Addresses;
    else if (this.#printing) console.log(name === 'launch' ? line : `${name.padEnd(LABEL_WIDTH)} | ${line}`);
    if (name === 'undivided') this.#undividedUrl ??= /Running on (http:\/\/\S+)/.exec(line)?.[1];
  }
}

async function runAll(addresses: Addresses, undivided: string): Promise<{ passed: number; failed: number }> {
  const response = await fetch(`${addresses.proxy.url}/v1/models`);
  const models = (await response.json()) as { data: { id: string }[] };
  const model = models.data[0]?.id ?? 'demo';
  const shape = readKvShape(options.model ?? demoModelDir(), onGpu ? 2 : 4, BLOCK_SIZE);
  let passed = 0;
  for (const [i, prompt] of PROMPTS.entries()) {
    console.log(`\n${i + 1}. ${JSON.stringify(prompt.prompt)}, ${prompt.maxTokens} tokens`);
    try {
      const result = await runPrompt(prompt, model, addresses, undivided, shape);
      console.log(`   completion   ${JSON.stringify(result.text)}`);
      console.log(`   first token  ${result.firstTokenMs.toFixed(1)} ms`);
      console.log(
        `   KV moved     ${result.bytesMoved.toLocaleString('en')} bytes in ${result.moveMs.toFixed(2)} ms (${options.sendType})`,
      );
      for (const problem of result.problems) console.log(`   FAILED       ${problem}`);
      if (result.problems.length === 0) {
        passed++;
        console.log('   passed       same text as the undivided worker; the KV came from the producer');
      }
    } catch (error) {
      console.log(`   FAILED       ${(error as Error).message}`);
    }
  }
  return { passed, failed: PROMPTS.length - passed };
}

/** `ipv6` becomes an address of this machine. */
function addressOf(host: string): string {
  if (host !== 'ipv6') return host;
  // Link-local ones carry a zone id, which no URL can.
  const own = ownAddresses().find(
    (address) => isIPv6(address) && !isLoopback(address) && !address.includes('%'),
  );
  if (own !== undefined) return own;
  throw new Error(
    '--host ipv6: this machine has no IPv6 address but loopback and link-local ones; to give it one until it restarts: ' +
      'sudo ip -6 address add fd00:7064::1/64 dev lo nodad',
  );
}

async function main(): Promise<number> {
  if (options.model !== undefined && !existsSync(join(options.model, 'config.json'))) {
    console.error(`demo: --model: there is no config.json in ${options.model}`);
    return 1;
  }
  if (options.keep && options.host.length > 1) {
    console.error('demo: --keep leaves one system serving: give one --host');
    return 1;
  }
  const rows: string[] = [];
  let passed = 0;
  let failed = 0;
  for (const given of options.host) {
    let row = `| ${given} | `;
    try {
      const host = addressOf(given);
      const demonstration = new Demonstration(host);
      const counts = await demonstration.run();
      if (!counts) return 130;
      passed += counts.passed;
      failed += counts.failed;
      const found =
        options.device === 'host' ? 'none: KV moves over TCP' : demonstration.bootstraps.summary(host);
      row = `| ${host} | ${counts.passed} passed, ${counts.failed} failed | ${found} |`;
    } catch (error) {
      if (options.host.length === 1) throw error;
      failed += PROMPTS.length;
      const [why = ''] = (error as Error).message.split('\n');
      console.error(`demo: ${(error as Error).message}`);
      row += `did not run: ${why} | |`;
    }
    rows.push(row);
    if (options.host.length > 1) console.log('');
  }
  if (options.keep && failed === 0) return 0;
  if (options.device !== 'host' || rows.length > 1) {
    console.log(`\n| address | four prompts | NCCL's bootstrap |\n|---|---|---|\n${rows.join('\n')}`);
  }
  console.log(`\n${passed} passed, ${failed} failed`);
  return failed === 0 ? 0 : 1;
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error(`demo: ${(error as Error).message}`);
  process.exitCode = 1;
} finally {
  await supervisor?.stop();
}
process.exit();
