/**
 * The program behind scripts/serve-results.sh: `pd-bench serve` on one undivided worker, then on proxy, producer and consumer, with the same
 * prompts; on the host also the proxy alone, and what one client's body does to another's stream. Failures are results, too.
 *
 *   main --device host|cuda --model DIR [--name NAME] [--executor host|cuda] --out DIR --command LINE [-- flags of pd-bench serve]
 */
import { execFile } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { loadavg } from 'node:os';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { Command, Option } from 'commander';
import { programFile } from '../../support/root.ts';
import { readEnvironment, readMachine } from '../measure/machine.ts';
import { conclude, hardwareLines, problemLines, writeResults } from '../measure/results.ts';
import { type SystemOptions, startPair, startUndivided } from '../pair/systems.ts';

interface Options {
  readonly device: 'host' | 'cuda';
  readonly model: string;
  readonly name?: string;
  readonly executor?: 'host' | 'cuda';
  readonly out: string;
  readonly command: string;
}

const WIDTHS = [1, 8];
/** Goes before the flags of the command line, which override it. */
const LOAD = ['--num-requests', '48', '--prompt-tokens', '256', '--output-tokens', '32'];
const OBJECTIVES = ['--slo-ttft', '1s', '--slo-itl', '100ms'];
/** Deadline of one measurement. */
const MEASURE_MS = 1_800_000;

const program = new Command('serve-results')
  .addOption(new Option('--device <device>').choices(['host', 'cuda']).default('host'))
  .requiredOption('--model <dir>')
  .option('--name <name>', "part of the page's file name, and what the workers call the model")
  .addOption(new Option('--executor <executor>').choices(['host', 'cuda']))
  .requiredOption('--out <dir>')
  .requiredOption('--command <line>')
  .argument('[flags...]', 'of pd-bench serve')
  .parse();
const options = program.opts<Options>();
const { device, model, name, executor } = options;
const sections: string[] = [];
const problems: string[] = [];

/** Runs programs (file and arguments) and adds their output as a section. A failure becomes a problem of the page. */
async function section(title: string, ...runs: readonly (readonly string[])[]): Promise<void> {
  console.error(title);
  const said: string[] = [];
  for (const [file = '', ...args] of runs) {
    const ended = await run(file, args);
    // the server's address is of no interest to a reader
    said.push(ended.stdout.replace(/^http:\/\/[^,]*, /, '').trimEnd());
    if (ended.problem !== undefined) problems.push(`${title}: ${ended.problem}`);
  }
  const text = said.join('\n\n');
  console.error(text);
  sections.push(`### ${title}`, '', '```', text, '```', '');
}

async function run(file: string, args: readonly string[]): Promise<{ stdout: string; problem?: string }> {
  try {
    const bounds = { timeout: MEASURE_MS, maxBuffer: 2 ** 26 };
    return await promisify(execFile)(process.execPath, [file, ...args], bounds);
  } catch (error) {
    const { stdout = '', stderr = '', message } = error as Error & { stdout?: string; stderr?: string };
    return { stdout, problem: stderr.trim().split('\n').at(-1) || message.split('\n')[0]! };
  }
}

/** Both systems get the same text seeds, hence the same prompts. */
async function measure(title: string, url: string, tokenizeUrl: string): Promise<void> {
  for (const width of WIDTHS) {
    const load = [
      ...LOAD,
      ...OBJECTIVES,
      '--concurrency',
      String(width),
      '--text-seed',
      String(1_000 + width),
    ];
    const urls = ['--url', url, '--tokenize-url', tokenizeUrl];
    await section(`${title}, ${width} at once`, [
      programFile('pd-bench'),
      'serve',
      ...urls,
      ...load,
      ...program.args,
    ]);
  }
}

/** A system that cannot be started is a problem; the next one is measured anyway. */
async function attempt<T extends { stop(): Promise<void> }>(
  title: string,
  start: () => Promise<T>,
  use: (system: T) => Promise<void>,
): Promise<void> {
  try {
    const system = await start();
    try {
      await use(system);
    } finally {
      await system.stop();
    }
  } catch (error) {
    problems.push(`${title}: ${(error as Error).message}`);
  }
}

function describeModel(): string {
  const config = JSON.parse(readFileSync(join(model, 'config.json'), 'utf8')) as Record<string, unknown>;
  const [architecture = config['model_type']] = (config['architectures'] as unknown[] | undefined) ?? [];
  return `${architecture}, ${config['num_hidden_layers']} layers, hidden size ${config['hidden_size']}, vocabulary of ${config['vocab_size']}`;
}

/** The commit of a checkout; an archive has only its version. */
async function revision(): Promise<string> {
  if (!existsSync('.git')) return '';
  const git = promisify(execFile)('git', ['rev-parse', '--short', 'HEAD'], { timeout: 10_000 });
  return git.then(
    ({ stdout }) => ` at ${stdout.trim()}`,
    () => '',
  );
}

const fromDist = (path: string) => fileURLToPath(new URL(path, import.meta.url));
const startedAt = new Date().toISOString();
const flags = [
  ...(executor === undefined ? [] : ['--executor', executor]),
  ...['--served-model-name', name ?? basename(model)],
];
const system: SystemOptions = { device, model, flags };

await attempt(
  'one undivided worker',
  () => startUndivided(system),
  ({ url }) => measure('one undivided worker', url, url),
);
await attempt(
  'producer, consumer and proxy',
  () => startPair(system),
  ({ client, consumerUrl }) => measure('producer, consumer and proxy', client.url, consumerUrl),
);
// Does not depend on what workers compute on, and takes minutes.
if (device === 'host') {
  const proxy = fromDist('../proxy/main.js');
  await section('the proxy alone', [proxy], [proxy, '--stream']);
  await section("what a body does to others' streams", [fromDist('../http-stalls.js'), '--tries', '3']);
}

const machine = await readMachine();
const load = loadavg().map((value) => value.toFixed(2));
const base = writeResults(
  {
    ...{ kind: 'serve', title: 'What clients see', date: startedAt.slice(0, 10) },
    hardware: `${device}${name === undefined ? '' : `-${name}`}`,
    machine: [
      `- ${machine.program}${await revision()}, Node ${machine.node}; load average at the end ${load.join(' ')}`,
      ...hardwareLines(machine, await readEnvironment(device)),
    ],
    command: options.command,
    body: [
      `Model ${name ?? 'demo'}: ${describeModel()}; computed on ${executor ?? device}.`,
      '',
      ...(problems.length > 0 ? [...problemLines(problems), ''] : []),
      ...sections,
    ],
  },
  options.out,
);
conclude(`${base}.md`, problems.length === 0);
