/** pd-proxy register: announces a server that does not ping by itself. Options, signals, exit. */
import { Command } from 'commander';
import { logOptions } from '../config/fields.ts';
import { duration, etcdAddress, hostPort, listOf, oneOf } from '../config/kinds.ts';
import { addOptions, defineOptions, option, resolveOptions } from '../config/options.ts';
import { vllmLogLevel } from '../config/vllm.ts';
import { PdError } from '../errors.ts';
import { type HostPort, isUnspecified } from '../net/address.ts';
import { hostAddress } from '../net/local.ts';
import { createLogger } from '../observability/log.ts';
import { packageVersion } from '../version.ts';

const REGISTER_OPTIONS = defineOptions({
  role: option({ kind: oneOf(['producer', 'consumer']), help: 'what the server is' }),
  http: option({ kind: hostPort(), help: 'its HTTP server, as proxies reach it' }),
  kv: option({ kind: hostPort(), help: 'where it takes KV, as its peers reach it' }),
  proxy: option({
    kind: listOf(hostPort()),
    help: 'discovery addresses of proxies, such as 127.0.0.1:30002; of a name, all its addresses',
    default: [],
    defaultText: 'none',
  }),
  registry: option({
    kind: etcdAddress(),
    help: 'etcd to register it with, for proxies that read it: etcd://host:2379/prefix',
    defaultText: 'none',
  }),
  pingInterval: option({
    kind: duration(10),
    help: 'between pings, and between looks at its GET /health',
    default: 3_000,
  }),
  ...logOptions('log.'),
});

/** Throws CONFIG_INVALID. */
export function registerOptions(argv: readonly string[], env: NodeJS.ProcessEnv) {
  const command = addOptions(new Command('pd-proxy register'), REGISTER_OPTIONS)
    .description(
      'Announces a server to proxies (one of vLLM that does not reach them itself, for example), for as long as its GET /health is answered.',
    )
    .version(packageVersion())
    .allowExcessArguments(false)
    .showHelpAfterError('(--help lists the options)')
    .parse(argv, { from: 'user' });
  const warnings: string[] = [];
  const { role, http, kv, proxy, registry, pingInterval, logLevel, logFormat } = resolveOptions(
    REGISTER_OPTIONS,
    command,
    env,
    ({ logLevel }) => vllmLogLevel(logLevel, env, warnings),
  );
  if (!role || !http || !kv || (proxy.length === 0 && !registry)) {
    const needs = '--role, --http and --kv, and whom to tell: --proxy or --registry';
    throw new PdError('CONFIG_INVALID', `pd-proxy register needs ${needs}`);
  }
  const log = { level: logLevel, format: logFormat };
  return { role, http, kv, proxy, ...(registry && { registry }), intervalMs: pingInterval, log, warnings };
}

/** Runs until SIGTERM or SIGINT. */
export async function main(argv: readonly string[]): Promise<void> {
  const {
    role,
    http,
    kv,
    proxy: proxies,
    log: logging,
    warnings,
    ...more
  } = registerOptions(argv, process.env);
  const told = new Promise<void>((resolve) => {
    for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => resolve());
  });
  const log = createLogger(logging, 'register');
  for (const warning of warnings) log.warn(warning);
  const addresses = { http: await reached(http, '--http'), kv: await reached(kv, '--kv') };
  // Imported here: --help and a wrong flag need no sockets.
  const { OnBehalf } = await import('../transfer/on-behalf.ts');
  const one = new OnBehalf({
    ...addresses,
    ...more,
    type: role === 'producer' ? 'P' : 'D',
    proxies,
    log,
  });
  await told;
  await one.close();
  log.info('Stopped');
  process.exit(0);
}

/** As an address: what is announced is one and the same for everybody. */
async function reached({ host, port }: HostPort, flag: string): Promise<HostPort> {
  if (isUnspecified(host))
    throw new PdError(
      'CONFIG_INVALID',
      `${flag}: ${host} is every address of a machine; give the one that others reach`,
    );
  return { host: await hostAddress(host, 0, flag), port };
}
