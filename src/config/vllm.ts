/**
 * What users of vLLM already have: its `--kv-transfer-config` JSON (docs/protocol.md, "Configuration") and its environment variables,
 * read where ours say nothing. The JSON is taken as people have it: numbers may be strings, and a key that means nothing here is named
 * in a warning, never an error.
 */

import { PdError } from '../errors.ts';
import type { LogLevel } from '../observability/log-options.ts';
import { z } from '../zod.ts';
import type { OptionLayer } from './options.ts';
import type { WorkerRole } from './worker-config.ts';
import type { WorkerOptions } from './worker-options.ts';

const FLAG = '--kv-transfer-config';

/** Keys that a vLLM user may rightly have and that need no answer here. */
const WITHOUT_EFFECT = new Set([
  'kv_connector',
  'kv_role',
  'kv_rank',
  'kv_parallel_size',
  'kv_ip',
  'kv_buffer_device',
  'engine_id',
  'enable_permute_local_kv',
  'kv_connector_extra_config',
]);

const ROLES: Readonly<Record<string, WorkerRole>> = { kv_producer: 'producer', kv_consumer: 'consumer' };

/** JSON key -> option name of the worker, at the top level and under kv_connector_extra_config. */
const TOP: Readonly<Record<string, keyof WorkerOptions>> = {
  kv_buffer_size: 'kvBufferSize',
  kv_port: 'kvPort',
  kv_load_failure_policy: 'kvLoadFailure',
};
const EXTRA: Readonly<Record<string, keyof WorkerOptions>> = {
  http_port: 'port',
  send_type: 'sendType',
  nccl_num_channels: 'ncclNumChannels',
  mem_pool_size_gb: 'memPoolSizeGb',
};

export interface VllmKvConfig {
  /** For the options, between the config file and the defaults. */
  readonly layer: OptionLayer;
  readonly kvRank?: number;
  readonly kvParallelSize?: number;
  readonly warnings: readonly string[];
}

const jsonObject = z.record(z.string(), z.unknown());
const whole = z
  .union([z.string().regex(/^\s*\d+\s*$/), z.number()])
  .transform(Number)
  .pipe(z.int().min(0));
const given = (value: unknown): boolean => value !== undefined && value !== null && value !== '';

/** Reads the JSON. Throws CONFIG_INVALID naming the key. */
export function parseVllmKvConfig(text: string): VllmKvConfig {
  const config = objectOf(parseJson(text), FLAG);
  const extra = objectOf(config['kv_connector_extra_config'] ?? {}, `kv_connector_extra_config in ${FLAG}`);
  const values: Record<string, { value: unknown; label: string }> = {};
  const warnings: string[] = [];
  const label = (key: string) => `${key} in ${FLAG}`;

  const connector = config['kv_connector'];
  if (given(connector) && connector !== 'P2pNcclConnector') {
    throw invalid('kv_connector', connector, '"P2pNcclConnector", the only connector spoken here');
  }
  const role = config['kv_role'];
  if (given(role)) {
    const known = ROLES[String(role)];
    if (known === undefined) {
      throw invalid('kv_role', role, '"kv_producer" or "kv_consumer" (an undivided worker needs no JSON)');
    }
    values['role'] = { value: known, label: label('kv_role') };
  }
  for (const [key, raw] of Object.entries(config)) {
    const name = TOP[key];
    if (name !== undefined && given(raw)) values[name] = { value: raw, label: label(key) };
    else if (name === undefined && !WITHOUT_EFFECT.has(key)) warnings.push(unknownKey(key));
  }
  for (const [key, raw] of Object.entries(extra)) {
    const name = EXTRA[key];
    if (name !== undefined && given(raw)) values[name] = { value: raw, label: label(key) };
    else if (name === undefined && key !== 'proxy_ip' && key !== 'proxy_port') {
      warnings.push(unknownKey(`kv_connector_extra_config.${key}`));
    }
  }
  const proxy = proxyOf(extra['proxy_ip'], extra['proxy_port']);
  if (proxy !== undefined) values['proxy'] = { value: proxy, label: label('proxy_ip, proxy_port') };

  const kvRank = wholeOf('kv_rank', config['kv_rank']);
  const kvParallelSize = wholeOf('kv_parallel_size', config['kv_parallel_size']);
  return {
    layer: { values },
    ...(kvRank === undefined ? {} : { kvRank }),
    ...(kvParallelSize === undefined ? {} : { kvParallelSize }),
    warnings,
  };
}

/**
 * With `kv_parallel_size` 2 the producer is rank 0 and the consumer rank 1; vLLM systems started with anything else hang. Throws
 * CONFIG_INVALID that says which value it should be.
 */
export function checkKvRank(config: VllmKvConfig, role: WorkerRole): void {
  const { kvRank, kvParallelSize = 1 } = config;
  if (kvParallelSize !== 1 && kvParallelSize !== 2) {
    throw invalid('kv_parallel_size', kvParallelSize, '1 or 2, or leave it out');
  }
  if (kvRank === undefined || kvParallelSize === 1 || role === 'both') return;
  const expected = role === 'producer' ? 0 : 1;
  if (kvRank !== expected) {
    throw invalid('kv_rank', kvRank, `${expected} for a ${role} with kv_parallel_size 2, or leave both out`);
  }
}

function proxyOf(ip: unknown, port: unknown): string | undefined {
  if (!given(ip)) return undefined;
  if (!given(port)) throw invalid('proxy_port', port, "the proxy's discovery port, since proxy_ip is given");
  const host = String(ip);
  return host.includes(':') && !host.startsWith('[') ? `[${host}]:${port}` : `${host}:${port}`;
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new PdError('CONFIG_INVALID', `${FLAG} is not JSON: ${(error as Error).message}`);
  }
}

function objectOf(value: unknown, what: string): Record<string, unknown> {
  const result = jsonObject.safeParse(value);
  if (result.success) return result.data;
  throw new PdError('CONFIG_INVALID', `${what} must be a JSON object`);
}

function wholeOf(key: string, raw: unknown): number | undefined {
  if (!given(raw)) return undefined;
  const result = whole.safeParse(raw);
  if (!result.success) throw invalid(key, raw, 'a whole number');
  return result.data;
}

function unknownKey(key: string): string {
  return `${FLAG}: ${key} means nothing here and is ignored`;
}

function invalid(key: string, value: unknown, allowed: string): PdError {
  const written = value === undefined ? 'nothing' : JSON.stringify(value);
  return new PdError('CONFIG_INVALID', `${key} in ${FLAG}: ${written} is not allowed; expected ${allowed}`);
}

const LOGGING_LEVEL = 'VLLM_LOGGING_LEVEL';

/** Python's names. `error` is the least that is logged here: what ends a program is above it. */
const LEVELS: Readonly<Record<string, LogLevel>> = {
  DEBUG: 'debug',
  INFO: 'info',
  WARN: 'warn',
  WARNING: 'warn',
  ERROR: 'error',
  CRITICAL: 'error',
  FATAL: 'error',
};

/**
 * A layer for the option `logLevel`, where that is not `given`. A value that is not a level becomes a warning: it is another program's
 * variable, so it stops nothing.
 */
export function vllmLogLevel(
  given: LogLevel | undefined,
  env: Readonly<Record<string, string | undefined>>,
  warnings: string[],
): OptionLayer[] {
  const theirs = env[LOGGING_LEVEL]?.trim();
  if (given !== undefined || !theirs) return [];
  const value = LEVELS[theirs.toUpperCase()];
  if (value !== undefined) {
    return [{ values: { logLevel: { value, label: `${LOGGING_LEVEL} (environment)` } } }];
  }
  const known = 'DEBUG, INFO, WARNING, ERROR and CRITICAL';
  warnings.push(
    `${LOGGING_LEVEL}=${theirs} is no level (known are ${known}) and is ignored; --log-level sets ours`,
  );
  return [];
}
