/**
 * The demonstration that KV truly moves: one proxy, one producer and one consumer, beside them one undivided worker, and four prompts.
 * Each must give the undivided worker's text, and the consumer's metrics must show that it loaded the prompt's KV and computed one token.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Command, Option } from 'commander';
import { Supervisor } from '../src/cli/launch-supervisor.ts';
import { demoModelDir } from '../src/model/demo.ts';
import { type Addresses, PROMPTS, runPrompt } from './demo-checks.ts';
import { readKvShape } from './kv-shape.ts';

const BLOCK_SIZE = 16;
/**
 * Where the GPU computes. Two workers share the first one, of which each would take all for KV blocks: so many are far more than the
 * prompts need, and 4 GiB of an 8B model. Texts are compared to the letter, and the pair computes the last token in another batch.
 */
const SHARING_A_GPU = ['--num-blocks', '2048', '--batch-invariant'];
const START_TIMEOUT_MS = 300_000;
const STOP_TIMEOUT_MS = 20_000;
/** As wide as pd-launch's labels. */
const LABEL_WIDTH = 'consumer-0'.length;

interface DemoOptions {
  readonly keep?: true;
  readonly sendType: string;
  readonly device: string;
  readonly executor?: string;
  readonly model?: string;
  readonly freePorts?: true;
  readonly runbookPorts?: true;
  readonly verbose?: true;
}

const options = new Command('demo.sh')
  .description(
    'Starts a proxy, a producer and a consumer, sends four prompts through them, and checks that KV moved.',
  )
  .option('--keep', "leave it serving on the runbook's ports until Ctrl-C")
  .option('--free-ports', 'with --keep: any free ports instead')
  .option('--runbook-ports', "without --keep too: the runbook's ports")
  .addOption(
    new Option('--send-type <type>', 'how KV moves')
      .choices(['PUT', 'PUT_ASYNC', 'GET'])
      .default('PUT_ASYNC'),
  )
  .option('--device <device>', 'host, or cuda for a GPU each', 'host')
  .addOption(
    new Option('--executor <executor>', 'what computes, where not the device').choices(['host', 'cuda']),
  )
  .option('--model <dir>', 'checkpoint directory (default: the bundled demo model)')
  .option('--verbose', 'print the log of every program')
  .allowExcessArguments(false)
  .parse()
  .opts<DemoOptions>();

const onGpu = (options.executor ?? options.device) === 'cuda';
/** `scripts/` of the sources, `dist/scripts/` in the bundle. */
const root = import.meta.url.includes('/dist/scripts/') ? '../../' : '../';
const bin = (name: string) => fileURLToPath(new URL(`${root}bin/${name}`, import.meta.url));
const given = (flag: string, value: string | undefined) => (value === undefined ? [] : [flag, value]);
const onRunbookPorts = (options.keep === true || options.runbookPorts === true) && options.freePorts !== true;
const workerArgs = ['--block-size', String(BLOCK_SIZE), ...(onGpu ? SHARING_A_GPU : [])];
const launchArgs = [
  ...['--json', '--device', options.device, '--send-type', options.sendType, '--kv-load-failure', 'fail'],
  ...given('--executor', options.executor),
  ...given('--model', options.model),
  ...(onRunbookPorts ? [] : ['--free-ports']),
  ...['--', ...workerArgs],
];
const undividedArgs = [
  ...['--role', 'both', '--host', '127.0.0.1', '--port', '0', ...workerArgs],
  ...['--device', options.device === 'cuda' ? 'cuda:0' : options.device],
  ...given('--executor', options.executor),
  ...given('--model', options.model),
  ...['--log-format', 'pretty'],
];

let system: Addresses | undefined;
let undividedUrl: string | undefined;
let printing = options.verbose === true;

const supervisor = new Supervisor({
  groups: [
    [{ name: 'launch', args: [bin('pd-launch'), ...launchArgs] }],
    [{ name: 'undivided', args: [bin('pd-worker'), ...undividedArgs] }],
  ],
  // Whatever ends here is a failure: pd-launch itself restarts what dies.
  restart: { firstPauseMs: 0, maxPauseMs: 0, deaths: 1, windowMs: 1 },
  killAfterMs: STOP_TIMEOUT_MS,
  onLine: (name, line) => {
    if (name === 'launch' && line.startsWith('{"proxy"')) system = JSON.parse(line) as Addresses;
    else if (printing) console.log(name === 'launch' ? line : `${name.padEnd(LABEL_WIDTH)} | ${line}`);
    if (name === 'undivided') undividedUrl ??= /Running on (http:\/\/\S+)/.exec(line)?.[1];
  },
  say: () => {},
});

/** The first signal stops all, the second kills. */
let stopSignal: NodeJS.Signals | undefined;
const signalled = new Promise<void>((resolve) => {
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.on(signal, () => {
      if (stopSignal) supervisor.kill();
      stopSignal ??= signal;
      resolve();
    });
  }
});

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

async function main(): Promise<number> {
  if (options.model !== undefined && !existsSync(join(options.model, 'config.json'))) {
    console.error(`demo: --model: there is no config.json in ${options.model}`);
    return 1;
  }
  console.log(
    `Starting a proxy, a producer and a consumer (${options.device}), and an undivided worker beside them`,
  );
  supervisor.start();
  const ready = supervisor.untilReady(
    async () => system !== undefined && undividedUrl !== undefined,
    START_TIMEOUT_MS,
  );
  await Promise.race([ready, signalled]);
  if (stopSignal || !system || !undividedUrl) return 130;
  const { proxy, producers, consumers } = system;
  console.log(`  proxy      ${proxy.url}, discovery ${proxy.discovery}`);
  for (const { url, kv } of producers) console.log(`  producer   ${url}, KV ${kv}`);
  for (const { url, kv } of consumers) console.log(`  consumer   ${url}, KV ${kv}`);
  console.log(`  undivided  ${undividedUrl}`);

  const counts = await Promise.race([runAll(system, undividedUrl), signalled]);
  if (!counts) return 130;
  const verdict = `${counts.passed} passed, ${counts.failed} failed`;
  if (options.keep && counts.failed === 0) {
    console.log(
      `\n${verdict}\n\nServing on ${proxy.url} (model ids: GET /v1/models). Stop with Ctrl-C, or: kill ${process.pid}`,
    );
    printing = true;
    const failure = await Promise.race([signalled, supervisor.failed]);
    if (failure) throw failure;
    return 0;
  }
  await supervisor.stop();
  console.log(`\n${verdict}`);
  return counts.failed === 0 ? 0 : 1;
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error(`demo: ${(error as Error).message}`);
  process.exitCode = 1;
} finally {
  await supervisor.stop();
}
process.exit();
