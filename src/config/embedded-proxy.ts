/** Configuration of a proxy that another program starts. */
import { z } from 'zod';
import type { LogOptions } from '../transfer/types.ts';
import {
  type Address,
  address,
  checkInput,
  logOptions,
  milliseconds,
  QUIET_LOG,
  ranges,
  withoutUndefined,
} from './input.ts';
import type { ProxyConfig } from './worker-config.ts';

/** `ProxyConfig` with every field optional. */
export interface ProxyConfigInput extends Partial<Omit<ProxyConfig, 'http' | 'discovery' | 'log'>> {
  /** Where clients connect. `127.0.0.1:0`: this machine only, any free port. */
  readonly http?: Address;
  /** Where instances ping. `127.0.0.1:0`. */
  readonly discovery?: Address;
  readonly log?: Partial<LogOptions>;
}

const LOOPBACK = { host: '127.0.0.1', port: 0 };

const INPUT = z.strictObject({
  http: address.default(LOOPBACK),
  discovery: address.default(LOOPBACK),
  allowInstances: ranges.optional(),
  instanceTimeoutMs: milliseconds.min(10).default(10_000),
  prefillTimeoutMs: milliseconds.min(1).default(600_000),
  decodeIdleTimeoutMs: milliseconds.min(1).default(600_000),
  overlap: z.int().min(0).max(1_024).default(4),
  drainTimeoutMs: milliseconds.default(30_000),
  log: logOptions.optional(),
} satisfies Record<keyof ProxyConfigInput, z.ZodType>);

/**
 * A complete proxy configuration from a few fields. Defaults are those of `pd-proxy --help`, but for what it binds (loopback, any free
 * port: `PdProxy.httpAddress` and `discoveryAddress` tell) and for the log (warnings alone). Throws CONFIG_INVALID that names the field.
 */
export function proxyConfig(input: ProxyConfigInput = {}): ProxyConfig {
  const { log = {}, ...given } = checkInput(INPUT, input, 'proxy configuration');
  return { ...given, log: { ...QUIET_LOG, ...withoutUndefined(log) } };
}
