/** pd-proxy: options, signals, exit. */
import { Command } from 'commander';
import { otelLayer } from '../config/fields.ts';
import { addOptions, resolveOptions } from '../config/options.ts';
import { PROXY_OPTIONS, type ProxyConfig, toProxyConfig } from '../config/proxy-config.ts';
import { vllmLogLevel } from '../config/vllm.ts';
import { createLogger } from '../observability/log.ts';
import { packageVersion } from '../version.ts';

/** `warn` is called, once the configuration is known, for everything that was ignored. */
export function proxyConfig(
  argv: readonly string[],
  env: NodeJS.ProcessEnv,
  warn: (text: string, config: ProxyConfig) => void = () => {},
): ProxyConfig {
  const command = addOptions(new Command('pd-proxy'), PROXY_OPTIONS)
    .description(
      'Sends each request to a prefill instance, then to a decode instance. Instances of pd-worker and vLLM find it by ping.',
    )
    .addHelpText('after', '\npd-proxy register --help: announces a server that does not ping by itself.')
    .version(packageVersion())
    .allowExcessArguments(false)
    .showHelpAfterError('(--help lists the options)')
    .parse(argv, { from: 'user' });
  const warnings: string[] = [];
  const values = resolveOptions(PROXY_OPTIONS, command, env, ({ logLevel }) => [
    ...vllmLogLevel(logLevel, env, warnings),
    ...otelLayer(env),
  ]);
  const config = toProxyConfig(values);
  for (const warning of warnings) warn(warning, config);
  return config;
}

/** Runs until SIGTERM or SIGINT; a second signal exits at once. */
export async function main(argv: readonly string[] = process.argv.slice(2)): Promise<void> {
  if (argv[0] === 'register') return await (await import('./register.ts')).main(argv.slice(1));
  const config = proxyConfig(argv, process.env, (text, { log }) => createLogger(log, 'proxy').warn(text));
  // Imported here: --help and a wrong flag need no server.
  const started = import('../proxy/proxy.ts').then(({ PdProxy }) => PdProxy.start(config));
  let signals = 0;
  await new Promise<void>((resolve, reject) => {
    const stop = () => {
      const drainMs = ++signals === 1 ? undefined : 0;
      started.then((proxy) => proxy.close(drainMs)).then(resolve, reject);
    };
    // From before startup ends: whoever reads that it is running may stop it at once.
    process.on('SIGTERM', stop).on('SIGINT', stop);
    started.catch(reject);
  });
  process.exit(0);
}
