/** Options of a transfer engine that is embedded: what a worker takes from its flags, with defaults that need nothing. */
import { z } from 'zod';
import { WIRE_LAYOUTS } from '../kv/families.ts';
import {
  DEFAULT_LIMITS,
  DEFAULT_TIMEOUTS,
  type Fingerprint,
  KV_KEYS,
  type LogOptions,
  SEND_TYPES,
  type TransferLimits,
  type TransferOptions,
  type TransferTimeouts,
} from '../transfer/types.ts';
import { SUFFIXED_IDS } from '../wire/ids.ts';
import {
  type Address,
  address,
  bytes,
  checkInput,
  device,
  hostForOthers,
  logOptions,
  name,
  QUIET_LOG,
  ranges,
  transferLimits,
  transferTimeouts,
  withoutUndefined,
} from './input.ts';

/** `TransferOptions` with every field optional. */
export interface TransferOptionsInput
  extends Partial<Omit<TransferOptions, 'bind' | 'timeouts' | 'limits' | 'log'>> {
  /** Where the engine listens. `127.0.0.1:0`: this machine only, any free port. */
  readonly bind?: Address;
  readonly timeouts?: Partial<TransferTimeouts>;
  readonly limits?: Partial<TransferLimits>;
  readonly log?: Partial<LogOptions>;
}

const INPUT = z.strictObject({
  device: device.default('host'),
  bind: address.default({ host: '127.0.0.1', port: 0 }),
  announceHost: name.optional(),
  rank: z.int().min(0).default(0),
  sendType: z.enum(SEND_TYPES).default('PUT_ASYNC'),
  kvBufferSize: bytes.default(1e9),
  memPoolSize: bytes.default(32 * 2 ** 30),
  ncclNumChannels: z.int().min(1).max(64).default(8),
  wireLayout: z.enum(WIRE_LAYOUTS).optional(),
  kvKey: z.enum(KV_KEYS).optional(),
  suffixedIds: z.enum(SUFFIXED_IDS).optional(),
  allowPeers: ranges.optional(),
  timeouts: transferTimeouts.optional(),
  limits: transferLimits.optional(),
  fingerprint: z.custom<Fingerprint>(isFingerprint, 'expected what fingerprint() makes').optional(),
  log: logOptions.optional(),
  httpAddress: name.optional(),
  proxyAddress: name.optional(),
} satisfies Record<keyof TransferOptionsInput, z.ZodType>);

/**
 * Complete options from a few. Defaults: host memory, loopback and any free port, PUT_ASYNC, 1e9 bytes of device memory for KV and up to
 * 32 GiB of host memory past it (taken on demand), the deadlines of `DEFAULT_TIMEOUTS`, warnings logged to stdout. Throws CONFIG_INVALID
 * that names the field.
 */
export function transferOptions(input: TransferOptionsInput = {}): TransferOptions {
  const { timeouts = {}, limits = {}, log = {}, ...given } = checkInput(INPUT, input, 'transfer options');
  return {
    announceHost: hostForOthers(given.bind.host),
    ...given,
    timeouts: { ...DEFAULT_TIMEOUTS, ...withoutUndefined(timeouts) },
    limits: { ...DEFAULT_LIMITS, ...withoutUndefined(limits) },
    log: { ...QUIET_LOG, ...withoutUndefined(log) },
  };
}

function isFingerprint(value: unknown): boolean {
  return typeof value === 'object' && value !== null && 'digest' in value && typeof value.digest === 'string';
}
