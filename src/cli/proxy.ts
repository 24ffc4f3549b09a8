/** pd-proxy: options, signals, exit. */
import { Command } from 'commander';
import { addressRange, duration, integer, listOf, oneOf, port, text } from '../config/kinds.ts';
import { addOptions, defineOptions, option, resolveOptions } from '../config/options.ts';
import { vllmLogLevel } from '../config/vllm-env.ts';
import type { ProxyConfig } from '../config/worker-config.ts';
import { createLogger } from '../observability/log.ts';
import { PdProxy } from '../proxy/proxy.ts';
import { packageVersion } from '../version.ts';

export const PROXY_OPTIONS = defineOptions({
  host: option({ kind: text('address'), help: 'address to listen on', default: '0.0.0.0' }),
  port: option({ kind: port(), help: 'HTTP port for clients', default: 10_002 }),
  discoveryHost: option({
    kind: text('address'),
    help: 'address to listen on for pings',
    defaultText: 'that of --host',
  }),
  discoveryPort: option({ kind: port(), help: 'port that instances ping (ZeroMQ)', default: 30_002 }),
  allowInstances: option({
    kind: listOf(addressRange()),
    help: 'whose pings are taken: addresses, or ranges such as 10.0.0.0/8',
    defaultText: "everyone's",
  }),
  instanceTimeout: option({
    kind: duration(10),
    help: 'an instance whose last ping is older is removed',
    default: 10_000,
  }),
  prefillTimeout: option({
    kind: duration(1),
    help: "for the producer's whole answer",
    default: 600_000,
  }),
  decodeIdleTimeout: option({
    kind: duration(1),
    help: "to the first part of the consumer's answer, and from one part to the next",
    default: 600_000,
  }),
  overlap: option({
    kind: integer(0, 1_024),
    help: 'the consumer is asked at once while the producer has at most so many requests of this proxy; 0: always in turn',
    default: 4,
  }),
  drainTimeout: option({
    kind: duration(0),
    help: 'after SIGTERM, for requests under way',
    default: 30_000,
  }),
  logLevel: option({
    kind: oneOf(['trace', 'debug', 'info', 'warn', 'error', 'silent']),
    help: 'least severe level that is logged',
    group: 'Log',
    default: 'info',
    defaultText: 'VLLM_LOGGING_LEVEL, or info',
  }),
  logFormat: option({
    kind: oneOf(['auto', 'pretty', 'json']),
    help: 'pretty for people, json for collectors, auto by whether stdout is a terminal',
    group: 'Log',
    default: 'auto',
  }),
  config: option({ kind: text('file'), help: 'JSON file with any of these options' }),
});

/** `warn` is told, once the configuration is known, of what was left out of account. */
export function proxyConfig(
  argv: readonly string[],
  env: NodeJS.ProcessEnv,
  warn: (text: string, config: ProxyConfig) => void = () => {},
): ProxyConfig {
  const command = addOptions(new Command('pd-proxy'), PROXY_OPTIONS)
    .description(
      'Sends each request to a prefill instance, then to a decode instance. Instances of pd-worker and vLLM find it by ping.',
    )
    .version(packageVersion())
    .allowExcessArguments(false)
    .showHelpAfterError('(--help lists the options)')
    .parse(argv, { from: 'user' });
  let warning: string | undefined;
  const { values } = resolveOptions(PROXY_OPTIONS, command, env, (given) => {
    if (given.logLevel !== undefined) return [];
    const level = vllmLogLevel(env);
    warning = level.warning;
    return [level.layer];
  });
  const config: ProxyConfig = {
    http: { host: values.host, port: values.port },
    discovery: { host: values.discoveryHost ?? values.host, port: values.discoveryPort },
    ...(values.allowInstances === undefined ? {} : { allowInstances: values.allowInstances }),
    instanceTimeoutMs: values.instanceTimeout,
    prefillTimeoutMs: values.prefillTimeout,
    decodeIdleTimeoutMs: values.decodeIdleTimeout,
    overlap: values.overlap,
    drainTimeoutMs: values.drainTimeout,
    log: { level: values.logLevel, format: values.logFormat },
  };
  if (warning !== undefined) warn(warning, config);
  return config;
}

/** Runs until SIGTERM or SIGINT; a second signal ends at once. */
export async function main(argv: readonly string[] = process.argv.slice(2)): Promise<void> {
  const config = proxyConfig(argv, process.env, (text, { log }) => createLogger(log, 'proxy').warn(text));
  const started = PdProxy.start(config);
  let signals = 0;
  await new Promise<void>((resolve, reject) => {
    const stop = () => {
      const drainMs = ++signals === 1 ? undefined : 0;
      started.then((proxy) => proxy.close(drainMs)).then(resolve, reject);
    };
    // Heard before the start is over: who reads that it listens may stop it at once.
    process.on('SIGTERM', stop).on('SIGINT', stop);
    started.catch(reject);
  });
  process.exit(0);
}
