/** pd-doctor: what this machine has and lacks for a worker, and whether a peer or a running system works. */
import { Command, Option } from 'commander';
import { duration, hostPort } from '../config/kinds.ts';
import { addOptions, envOf, kebab, parseValue } from '../config/options.ts';
import { readWorkerOptions } from '../config/resolve-worker.ts';
import { WORKER_OPTIONS } from '../config/worker-options.ts';
import { type DoctorOptions, examine } from '../doctor/doctor.ts';
import { renderReport } from '../doctor/render.ts';
import { PdError } from '../errors.ts';
import { packageVersion } from '../version.ts';
import { resolveWorkerHere } from './device-auto.ts';
import { print, splitArguments } from './run.ts';

/** Those of pd-worker that are accepted here too; all others go after `--`. */
const WORKER_FLAGS = [
  'role',
  'device',
  'executor',
  'model',
  'host',
  'port',
  'kvHost',
  'kvPort',
  'kvTransferConfig',
] as const satisfies (keyof typeof WORKER_OPTIONS)[];

const EXAMPLES = `
Examples:
  pd-doctor                                      check this machine
  pd-doctor --device cuda:0 --role producer      would a producer start on that GPU, with its default ports?
  pd-doctor --kv-transfer-config "$JSON"         vLLM's JSON: roles, ranks, ports
  pd-doctor --peer 10.0.0.2:8084                 the KV listener of another instance
  pd-doctor --proxy http://127.0.0.1:10002       a running system: the runbook's checklist, with one short completion
  pd-doctor --worker http://127.0.0.1:8083       a worker that waits: for what, and what to do about it

Exit status 1 if something would stop a worker, or the system that was asked about.`;

export interface DoctorCommand {
  readonly options: DoctorOptions;
  readonly json: boolean;
}

export async function doctorCommand(argv: readonly string[], env: NodeJS.ProcessEnv): Promise<DoctorCommand> {
  const [own, extra] = splitArguments(argv);
  const command = new Command('pd-doctor')
    .description(
      'Checks Node, libraries, GPUs, environment variables, ports and addresses, and says how to fix what is wrong.',
    )
    .usage('[options] [-- more flags of that pd-worker]')
    .version(packageVersion())
    .addOption(
      new Option('--peer <host:port>', 'test the KV listener of another instance, in both directions'),
    )
    .addOption(new Option('--proxy <url>', "run the runbook's checklist on the system behind this proxy"))
    .addOption(
      new Option(
        '--worker <url>',
        'read /debug/state of a worker (--debug-state): which hang scenario is it?',
      ),
    )
    .addOption(new Option('--timeout <time>', 'of each check').default('5s', '5s'))
    .addOption(new Option('--json', 'print the findings as JSON'))
    .allowExcessArguments(false)
    .showHelpAfterError('(--help lists the options; flags of the worker go after --)')
    .addHelpText('after', EXAMPLES);
  for (const name of WORKER_FLAGS) {
    const { kind, help } = WORKER_OPTIONS[name];
    command.addOption(
      new Option(`--${kebab(name)} <${kind.argument ?? name}>`, help).helpGroup('The worker:'),
    );
  }
  const given = command.parse(own, { from: 'user' }).opts<Record<string, string | undefined>>();
  const { peer, proxy, worker, timeout } = given;
  const flags = WORKER_FLAGS.flatMap((name) => {
    const value = given[name];
    return value === undefined ? [] : [`--${kebab(name)}`, value];
  });
  const argvOfWorker = [...flags, ...extra];
  return {
    options: {
      worker: await resolveWorker(argvOfWorker, env),
      inParticular: argvOfWorker.length > 0 || Object.keys(WORKER_OPTIONS).some((name) => envOf(name) in env),
      ...(peer === undefined ? {} : { peer: parseValue(hostPort(), peer, '--peer') }),
      ...(proxy === undefined ? {} : { proxy: urlOf('--proxy', proxy, 10_002) }),
      ...(worker === undefined ? {} : { workerUrl: urlOf('--worker', worker, 8_083) }),
      timeoutMs: parseValue(duration(1), timeout ?? '5s', '--timeout'),
    },
    json: given['json'] !== undefined,
  };
}

async function resolveWorker(
  argv: readonly string[],
  env: NodeJS.ProcessEnv,
): Promise<DoctorOptions['worker']> {
  try {
    // Not the command of cli/worker.ts: that imports the whole worker, parts of which may not load here.
    const command = addOptions(new Command('pd-worker'), WORKER_OPTIONS)
      .allowExcessArguments(false)
      .exitOverride()
      .configureOutput({ writeErr: () => {} });
    return await resolveWorkerHere(readWorkerOptions(command.parse(argv, { from: 'user' }), env), env);
  } catch (cause) {
    // commander's own words for a flag that does not exist
    return PdError.from(cause, 'CONFIG_INVALID');
  }
}

/** Accepts `HOST:PORT` too. */
function urlOf(flag: string, text: string, port: number): string {
  const url = /^https?:\/\//.test(text) ? text : `http://${text}`;
  if (URL.canParse(url)) return url;
  throw new PdError(
    'CONFIG_INVALID',
    `${flag}: ${JSON.stringify(text)} is not a URL such as http://127.0.0.1:${port}`,
  );
}

export async function main(argv: readonly string[] = process.argv.slice(2)): Promise<void> {
  const { options, json } = await doctorCommand(argv, process.env);
  const report = await examine(options);
  const colour = process.stdout.isTTY === true && !process.env['NO_COLOR'];
  const text = json
    ? `${JSON.stringify(report, undefined, 2)}\n`
    : renderReport(report, { colour, width: Math.max(60, Math.min(process.stdout.columns ?? 120, 160)) });
  await print(text);
  process.exit(report.sound ? 0 : 1);
}
