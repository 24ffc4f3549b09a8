/** pd-launch: a proxy and its workers on one machine, started, supervised and stopped together. */
import { Command } from 'commander';
import { demoModelDir } from '../config/demo-model.ts';
import { withWayOut } from '../config/device-choice.ts';
import { duration, integer, oneOf, port, text, toggle } from '../config/kinds.ts';
import { addOptions, defineOptions, grouped, option, resolveOptions } from '../config/options.ts';
import { vllmLogLevel } from '../config/vllm.ts';
import { EXECUTORS, LOAD_FAILURE_POLICIES } from '../config/worker-config.ts';
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort, httpUrl } from '../net/address.ts';
import { ask } from '../net/http.ts';
import { hostAddress } from '../net/local.ts';
import { LOG_LEVELS } from '../observability/log-options.ts';
import { packageVersion } from '../version.ts';
import { SEND_TYPES } from '../wire/messages.ts';

import { LaunchOutput, LogFiles } from './launch-output.ts';
import { type LaunchPlan, type LaunchSettings, launchDevices, planLaunch } from './launch-plan.ts';
import { Supervisor } from './launch-supervisor.ts';
import { splitArguments } from './run.ts';

export const LAUNCH_OPTIONS = defineOptions({
  prefill: option({ kind: integer(1, 64), help: 'producers (prefill instances)', default: 1 }),
  decode: option({ kind: integer(1, 64), help: 'consumers (decode instances)', default: 1 }),
  device: option({
    kind: text('device'),
    help: 'cuda: a separate GPU for each worker, producers first; cuda:N: one GPU, whose memory they divide; host; or auto: cuda if a GPU is visible, else host',
    default: 'auto',
  }),
  json: option({
    kind: toggle(),
    help: 'once ready, print all addresses as one line of JSON on stdout; logs go to stderr',
    default: false,
  }),
  startTimeout: option({ kind: duration(1), help: 'until everything serves', default: 600_000 }),
  drainTimeout: option({ kind: duration(0), help: 'when stopping, for requests in flight', default: 30_000 }),
  apiKeyFile: option({
    kind: text('file'),
    help: 'keys that clients of the proxy must show (pd-proxy --help); the workers need none',
    defaultText: 'no key is needed',
  }),
  config: option({ kind: text('file'), help: 'JSON file with any of these options' }),
  ...grouped('Workers', {
    model: option({ kind: text('dir'), help: 'checkpoint directory', defaultText: 'the bundled demo model' }),
    sendType: option({ kind: oneOf(SEND_TYPES), help: 'how KV moves', defaultText: 'PUT_ASYNC' }),
    executor: option({ kind: oneOf(EXECUTORS), help: 'what computes', defaultText: 'by device' }),
    kvLoadFailure: option({
      kind: oneOf(LOAD_FAILURE_POLICIES),
      help: 'what a consumer does if KV does not arrive',
      defaultText: 'recompute',
    }),
  }),
  ...grouped('Each program', {
    proxyFlags: option({
      kind: text('flags'),
      help: 'for pd-proxy, separated by spaces; addresses and TLS are not among them',
      defaultText: 'none',
    }),
    prefillFlags: option({ kind: text('flags'), help: 'for the producers alone', defaultText: 'none' }),
    decodeFlags: option({ kind: text('flags'), help: 'for the consumers alone', defaultText: 'none' }),
  }),
  ...grouped('Addresses', {
    host: option({ kind: text('address'), help: 'address all listen on', default: '127.0.0.1' }),
    port: option({ kind: port(), help: "the proxy's HTTP port", default: 10_002 }),
    discoveryPort: option({ kind: port(), help: "the proxy's discovery port", default: 30_002 }),
    basePort: option({
      kind: integer(1, 65_000, 'port'),
      help: "the first worker's HTTP port; its KV port is the next, and so on for the other workers",
      default: 8_081,
    }),
    freePorts: option({ kind: toggle(), help: 'use any free ports instead', default: false }),
  }),
  ...grouped('Log', {
    logLevel: option({
      kind: oneOf(LOG_LEVELS),
      help: 'least severe level that is logged',
      default: 'info',
      defaultText: 'VLLM_LOGGING_LEVEL, or info',
    }),
    logFormat: option({ kind: oneOf(['pretty', 'json']), help: 'of every program', default: 'pretty' }),
    logDir: option({
      kind: text('dir'),
      help: 'also append the log of each program to a file of its own: proxy.log, producer-0.log, ...',
      defaultText: 'terminal only',
    }),
  }),
});

/** Flags of pd-launch that are passed to the workers unchanged. */
const PASSED_ON = {
  model: '--model',
  sendType: '--send-type',
  executor: '--executor',
  kvLoadFailure: '--kv-load-failure',
} as const;

export interface LaunchOptions {
  readonly settings: LaunchSettings;
  readonly json: boolean;
  readonly startTimeoutMs: number;
  readonly logDir?: string;
  /** To be printed at start. */
  readonly warnings: readonly string[];
}

export function launchOptions(argv: readonly string[], env: NodeJS.ProcessEnv): LaunchOptions {
  const [own, extra] = splitArguments(argv);
  const command = addOptions(new Command('pd-launch'), LAUNCH_OPTIONS)
    .description('Starts a proxy, producers and consumers on this machine, and keeps them running.')
    .usage('[options] [-- flags for every pd-worker]')
    .version(packageVersion())
    .allowExcessArguments(false)
    .showHelpAfterError('(--help lists the options; flags for the workers go after --)')
    .parse(own, { from: 'user' });
  const warnings: string[] = [];
  const values = resolveOptions(LAUNCH_OPTIONS, command, env, ({ logLevel }) =>
    vllmLogLevel(logLevel, env, warnings),
  );
  if (!/^(auto|host|cuda(:\d+)?)$/.test(values.device)) {
    throw new PdError(
      'CONFIG_INVALID',
      `--device: ${JSON.stringify(values.device)} is not allowed; expected auto, host, cuda or cuda:N`,
    );
  }
  const passed = Object.entries(PASSED_ON).flatMap(([name, flag]) => {
    const value = values[name as keyof typeof PASSED_ON];
    return value === undefined ? [] : [flag, value];
  });
  const { prefill, decode, model, json, logDir, drainTimeout, startTimeout } = values;
  const { proxyFlags, prefillFlags, decodeFlags } = values;
  const settings = {
    ...values,
    drainTimeoutMs: drainTimeout,
    ...(prefill + decode > 2 && { tokenizer: model ?? demoModelDir() }),
    flags: {
      proxy: words(proxyFlags, '--proxy-flags', PROXY_ADDRESSES),
      producer: [...passed, ...extra, ...words(prefillFlags, '--prefill-flags', WORKER_ADDRESSES)],
      consumer: [...passed, ...extra, ...words(decodeFlags, '--decode-flags', WORKER_ADDRESSES)],
    },
  };
  return { settings, json, startTimeoutMs: startTimeout, ...(logDir && { logDir }), warnings };
}

/** By which pd-launch reaches its programs, and says where they are. It asks its proxy without TLS. */
const PROXY_ADDRESSES = new Set(['--host', '--port', '--discovery-port', '--tls-cert', '--tls-key']);
const WORKER_ADDRESSES = new Set(['--role', '--host', '--port', '--kv-host', '--kv-port']);

/** Of a text of flags; none has a space in it. Throws CONFIG_INVALID where one is of `kept`. */
function words(flags = '', option: string, kept: ReadonlySet<string>): string[] {
  const all = flags.split(/\s+/).filter((word) => word !== '');
  const own = all.map((word) => word.replace(/=.*/s, '')).find((word) => kept.has(word));
  if (own !== undefined) {
    const what = `${own} is set by pd-launch itself (--help), or needs programs that are started by hand (docs/operations.md)`;
    throw new PdError('CONFIG_INVALID', `${option}: ${what}`);
  }
  return all;
}

/** After SIGTERM a program has its drain timeout, and this much more to exit. */
const KILL_GRACE_MS = 5_000;

/** Runs until a signal, or until something cannot be kept running, which throws. A second signal kills. */
export async function main(argv: readonly string[] = process.argv.slice(2)): Promise<void> {
  const { settings: given, json, startTimeoutMs, logDir, warnings } = launchOptions(argv, process.env);
  // Resolved once, so that all bind and reach the same address.
  const settings = { ...given, host: await hostAddress(given.host, 0, '--host') };
  const choice = await launchDevices(settings);
  const plan = await planLaunch(settings, choice.devices);
  const stream = json ? process.stderr : process.stdout;
  for (const out of [process.stdout, process.stderr]) out.on('error', () => {}); // whoever read it has gone; serving goes on
  const specs = [plan.proxy.spec, ...plan.workers.map((worker) => worker.spec)];
  const output = new LaunchOutput({
    format: settings.logFormat,
    colour: stream.isTTY === true && !process.env['NO_COLOR'],
    width: Math.max('launch'.length, ...specs.map((spec) => spec.name.length)),
    write: (line) => void stream.write(line),
  });
  const hear = (name: string, line: string) => {
    output.line(name, line);
    files?.line(name, line);
  };
  const say = (words: string) => {
    for (const line of words.split('\n')) hear('launch', line);
  };
  const names = ['launch', ...specs.map((spec) => spec.name)];
  const files = logDir === undefined ? undefined : new LogFiles(logDir, names, say);
  const specsOf = (role: string) =>
    plan.workers.filter((worker) => worker.role === role).map(({ spec }) => spec);
  const supervisor = new Supervisor({
    // Stopped in this order: requests in the proxy need both, and what a consumer still loads needs its producer.
    groups: [[plan.proxy.spec], specsOf('consumer'), specsOf('producer')],
    killAfterMs: settings.drainTimeoutMs + KILL_GRACE_MS,
    onLine: hear,
    say,
  });

  let signals = 0;
  const signalled = new Promise<void>((resolve) => {
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
      process.on(signal, () => {
        if (++signals > 1) return supervisor.kill();
        say(`${signal}: stopping all; a second signal kills`);
        void supervisor.stop();
        resolve();
      });
    }
  });
  try {
    for (const warning of warnings) say(warning);
    say(choice.line);
    supervisor.start();
    await supervisor
      .untilReady(() => allListed(plan, settings), startTimeoutMs)
      .catch((cause: unknown) => {
        throw withWayOut(PdError.from(cause), choice);
      });
    if (signals === 0) announce(plan, settings, json, say);
    const failure = await Promise.race([signalled, supervisor.failed]);
    if (failure) throw failure;
  } finally {
    await supervisor.stop();
    files?.close();
  }
  process.exit(0);
}

const HEALTH_TIMEOUT_MS = 2_000;

/** Whether the proxy lists as many instances of each role as were started. */
async function allListed(plan: LaunchPlan, settings: LaunchSettings): Promise<boolean> {
  try {
    const response = await ask(`${urlOf(settings, plan.proxy.httpPort)}/health`, HEALTH_TIMEOUT_MS);
    const { counts } = response.json() as { counts?: { producer?: number; consumer?: number } };
    return counts?.producer === settings.prefill && counts.consumer === settings.decode;
  } catch {
    return false; // not there yet
  }
}

function announce(
  plan: LaunchPlan,
  settings: LaunchSettings,
  json: boolean,
  say: (text: string) => void,
): void {
  const of = (role: string) =>
    plan.workers
      .filter((worker) => worker.role === role)
      .map(({ spec, httpPort, kvPort, device }) => ({
        name: spec.name,
        url: urlOf(settings, httpPort),
        kv: addressOf(settings, kvPort),
        device,
      }));
  const addresses = {
    proxy: {
      url: urlOf(settings, plan.proxy.httpPort),
      discovery: addressOf(settings, plan.proxy.discoveryPort),
    },
    producers: of('producer'),
    consumers: of('consumer'),
  };
  if (json) process.stdout.write(`${JSON.stringify(addresses)}\n`);
  say(
    `ready: ${addresses.proxy.url} serves with ${settings.prefill} prefill and ${settings.decode} decode on ${deviceWord(plan)}; Ctrl-C stops all`,
  );
}

/** Of the ready line. */
const deviceWord = ({ workers }: LaunchPlan) =>
  workers.every(({ device }) => device === 'host') ? 'host' : 'cuda';
const addressOf = ({ host }: LaunchSettings, port: number) => formatHostPort(asDestination({ host, port }));
const urlOf = ({ host }: LaunchSettings, port: number) => httpUrl(asDestination({ host, port }));
