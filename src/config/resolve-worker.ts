/** How the options of `pd-worker` become a WorkerConfig. */
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import type { Command } from 'commander';
import { PdError } from '../errors.ts';
import { asDestination, type HostPort } from '../net/address.ts';
import { announceHost, defaultAddress, type LocalOptions } from '../net/local.ts';
import { fieldsOf, otelLayer } from './fields.ts';
import { checkAnnounced } from './hosts.ts';
import { type OptionLayer, resolveOptions } from './options.ts';
import { DEFAULT_LIMITS } from './transfer-options.ts';
import { checkKvRank, parseVllmKvConfig, type VllmKvConfig, vllmLogLevel } from './vllm.ts';
import type { WorkerConfig, WorkerRole } from './worker-config.ts';
import { WORKER_OPTIONS, type WorkerOptions } from './worker-options.ts';

/** HTTP ports of the runbook. */
const HTTP_PORTS: Readonly<Record<WorkerRole, number>> = { producer: 8081, consumer: 8083, both: 8080 };

/** What the configuration needs from its environment, passed in so that resolving can be tested. */
export interface WorkerEnvironment {
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly interfaces?: NonNullable<LocalOptions['interfaces']>;
  /** Directory of the bundled model. */
  readonly demoModelDir: () => string;
  /** What `--device auto` means here (device-choice.ts); not needed where a device is named. */
  readonly autoDevice?: string;
}

/** What flags, environment, file and vLLM's JSON say, before anything is asked of the machine. */
export interface GivenWorker {
  readonly options: WorkerOptions;
  readonly warnings: readonly string[];
}

export interface ResolvedWorker {
  readonly config: WorkerConfig;
  /** To be logged at start. */
  readonly warnings: readonly string[];
}

/** Flags, environment, file and vLLM's JSON, validated. Throws CONFIG_INVALID. */
export function readWorkerOptions(command: Command, env: WorkerEnvironment['env']): GivenWorker {
  let vllm: VllmKvConfig | undefined;
  const warnings: string[] = [];
  const values = resolveOptions(WORKER_OPTIONS, command, env, (given) => {
    const layers: OptionLayer[] = [];
    if (given.kvTransferConfig !== undefined) {
      vllm = parseVllmKvConfig(given.kvTransferConfig);
      layers.push(vllm.layer);
    }
    layers.push(...vllmLogLevel(given.logLevel, env, warnings), ...otelLayer(env));
    if (env['VLLM_DISABLE_REQUEST_ID_RANDOMIZATION'] === '1') {
      const label = 'VLLM_DISABLE_REQUEST_ID_RANDOMIZATION (environment)';
      layers.push({ values: { randomizeRequestIds: { value: false, label } } });
    }
    return layers;
  });
  if (vllm !== undefined) {
    if (values.role === 'both') {
      throw new PdError(
        'CONFIG_INVALID',
        '--kv-transfer-config without kv_role, or with --role both, moves no KV; give kv_role or --role producer|consumer',
      );
    }
    checkKvRank(vllm, values.role);
  }
  const named = vllm?.layer.values['role']?.value;
  const overruled =
    named !== undefined && named !== values.role
      ? [`kv_role of --kv-transfer-config says ${named}; --role ${values.role} wins`]
      : [];
  return { options: values, warnings: [...warnings, ...(vllm?.warnings ?? []), ...overruled] };
}

/** What is given, into one shape. Throws CONFIG_INVALID, ADDRESS_INVALID. */
export function resolveGivenWorker(
  { options, warnings }: GivenWorker,
  outside: WorkerEnvironment,
): ResolvedWorker {
  const config = toWorkerConfig(options, outside);
  return { config, warnings: [...warnings, ...checkAnnounced(config, outside)] };
}

/** Validated options into the config. Throws CONFIG_INVALID, ADDRESS_INVALID; INTERNAL if `auto` has not been decided. */
export function toWorkerConfig(options: WorkerOptions, outside: WorkerEnvironment): WorkerConfig {
  const device = options.device === 'auto' ? outside.autoDevice : options.device;
  if (device === undefined) throw new PdError('INTERNAL', '--device auto has not been decided');
  const onCuda = device !== 'host';
  const executor = options.executor ?? (onCuda ? 'cuda' : 'host');
  if (executor === 'cuda' && !onCuda) {
    throw new PdError('CONFIG_INVALID', '--executor: "cuda" needs --device cuda:N');
  }
  const http: HostPort = { host: options.host, port: options.port ?? HTTP_PORTS[options.role] };
  if (options.transport !== 'auto' && (options.transport === 'host') === onCuda) {
    throw new PdError('CONFIG_INVALID', `--transport ${options.transport} does not reach --device ${device}`);
  }
  // Not every interface: the address told to peers is the one bound, so a firewall rule or a second network shows at once.
  // PD_HOST_IP is an address for others: the machine itself may not have it, so it is never bound.
  const kvHost = options.kvHost ?? defaultAddress(outside);
  const kvAnnounceHost = options.kvAnnounceHost ?? announceHost(kvHost, outside);
  const httpAnnounceHost = options.httpAnnounceHost ?? announceHost(http.host, outside);
  const modelDir = options.model === undefined ? outside.demoModelDir() : resolve(options.model);
  if (!existsSync(join(modelDir, 'config.json'))) {
    const named = options.model === undefined ? 'the bundled demo model' : `--model ${options.model}`;
    throw new PdError(
      'CONFIG_INVALID',
      `${named}: ${modelDir} is not a checkpoint directory (no config.json)`,
    );
  }
  const { transfer, ...fields } = fieldsOf(WORKER_OPTIONS, options);
  return {
    ...fields,
    modelDir,
    servedModelNames: options.servedModelName ?? [options.model ?? 'demo'],
    executor,
    // the connector that vLLM's JSON names moves KV by NCCL
    transport:
      options.transport === 'auto' && options.kvTransferConfig !== undefined && onCuda
        ? 'nccl'
        : options.transport,
    http,
    httpAnnounceHost,
    proxy: options.proxy.map(asDestination),
    transfer: {
      ...transfer,
      device,
      bind: { host: kvHost, port: options.kvPort },
      announceHost: kvAnnounceHost,
      rank: 0,
      limits: { ...DEFAULT_LIMITS, ...transfer.limits },
    },
    ...(options.debugStateRemote
      ? { debugState: 'anyone' as const }
      : options.debugState
        ? { debugState: 'loopback' as const }
        : {}),
    maxNumSeqs: options.maxNumSeqs ?? (executor === 'cuda' ? 256 : 32),
    maxNumBatchedTokens: options.maxNumBatchedTokens ?? (executor === 'cuda' ? 8_192 : 512),
    ...(options.debugLogits !== undefined && { debugLogits: resolve(options.debugLogits) }),
  };
}
