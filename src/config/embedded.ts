/** Workers and transfer engines that another program configures: what `pd-worker` takes from its flags, with defaults that need nothing. */

import { asDestination } from '../net/address.ts';
import type { LogOptions } from '../observability/log-options.ts';
import type { Fingerprint } from '../wire/fingerprint.ts';
import { z } from '../zod.ts';
import type { AccessConfig } from './access-options.ts';
import { demoModelDir } from './demo-model.ts';
import { checkInput, fieldsOf, QUIET_LOG, shapeOf, withoutUndefined } from './fields.ts';
import { hostForOthers } from './hosts.ts';
import { type Address, address } from './kinds.ts';
import { defaultsOf } from './options.ts';
import { toWorkerConfig } from './resolve-worker.ts';
import {
  DEFAULT_LIMITS,
  type TransferLimits,
  type TransferOptions,
  type TransferTimeouts,
} from './transfer-options.ts';
import type { WorkerConfig } from './worker-config.ts';
import { WORKER_OPTIONS } from './worker-options.ts';

/** `TransferOptions` with every field optional. */
export interface TransferOptionsInput
  extends Partial<Omit<TransferOptions, 'bind' | 'timeouts' | 'limits' | 'log'>> {
  /** Where the engine listens. `127.0.0.1:0`: this machine only, any free port. */
  readonly bind?: Address;
  readonly timeouts?: Partial<TransferTimeouts>;
  readonly limits?: Partial<TransferLimits>;
  readonly log?: Partial<LogOptions>;
}

/** What only a running worker knows, or says under another name. */
type NotOfWorkers = 'bind' | 'announceHost' | 'rank' | 'fingerprint' | 'httpAddress' | 'proxyAddress';

/**
 * `WorkerConfig` with every field optional, those of its transfer engine beside the others. A `WorkerConfig` may be given as well: what
 * stands beside its `transfer` wins over what is in it.
 */
export interface WorkerConfigInput
  extends Partial<Omit<WorkerConfig, 'http' | 'access' | 'proxy' | 'transfer'>>,
    Omit<TransferOptionsInput, NotOfWorkers> {
  /** Where HTTP is bound. `127.0.0.1:0`: this machine only, any free port. */
  readonly http?: Address;
  readonly access?: Partial<AccessConfig>;
  readonly kv?: {
    /** `127.0.0.1:0`. */
    readonly bind?: Address;
    readonly announceHost?: string;
    readonly rank?: number;
  };
  /** Where a proxy takes pings (`PdProxy.discoveryAddress`), or several do. Absent: no ping. */
  readonly proxy?: Address | readonly Address[];
  readonly transfer?: TransferOptionsInput;
}

const LOOPBACK = { host: '127.0.0.1', port: 0 };

const name = z.string().min(1);
const count = z.int().min(1);

/** Fields of TransferOptions that are options of a worker. */
const SHARED = {
  ...shapeOf(WORKER_OPTIONS, 'transfer.'),
  timeouts: z.strictObject(shapeOf(WORKER_OPTIONS, 'transfer.timeouts.')).optional(),
  limits: z
    .strictObject({
      maxTensorBytes: count.optional(),
      maxTensors: count.optional(),
      maxQueuePerPeer: count.optional(),
      ...shapeOf(WORKER_OPTIONS, 'transfer.limits.'),
    } satisfies Record<keyof TransferLimits, z.ZodType>)
    .optional(),
  log: z.strictObject(shapeOf(WORKER_OPTIONS, 'transfer.log.')).optional(),
};

const LISTENER = {
  bind: address.optional(),
  announceHost: name.optional(),
  rank: z.int().min(0).optional(),
};

const TRANSFER = z.strictObject({
  ...SHARED,
  ...LISTENER,
  fingerprint: z.custom<Fingerprint>(isFingerprint, 'expected what fingerprint() makes').optional(),
  httpAddress: name.optional(),
  proxyAddress: name.optional(),
} satisfies Record<keyof TransferOptionsInput, z.ZodType>);

const WORKER = z.strictObject({
  ...shapeOf(WORKER_OPTIONS, ''),
  modelDir: name.optional(),
  http: address.default(LOOPBACK),
  access: z.strictObject(shapeOf(WORKER_OPTIONS, 'access.')).default({}),
  proxy: z
    .union([address.transform((one) => [one]), z.array(address)])
    .transform((all) => all.map(asDestination))
    .optional(),
  debugState: z.enum(['loopback', 'anyone']).optional(),
  kv: z.strictObject(LISTENER).optional(),
  ...SHARED,
  transfer: TRANSFER.optional(),
} satisfies Record<keyof WorkerConfigInput, z.ZodType>);

/**
 * Complete options from a few. Defaults: host memory, loopback and any free port, PUT_ASYNC, 1e9 bytes of device memory for KV and up to
 * 32 GiB of host memory past it (taken on demand), the deadlines of `DEFAULT_TIMEOUTS`, warnings logged to stdout. Throws CONFIG_INVALID
 * that names the field.
 */
export function transferOptions(input: TransferOptionsInput = {}): TransferOptions {
  return completeTransfer(checkInput(TRANSFER, input, 'transfer options'));
}

/**
 * A complete worker configuration from a few fields. Defaults are those of `pd-worker --help` (role `both`, the bundled demo model as
 * `demo`), but for what it binds: loopback and any free port, so that nothing is served to a network unasked; for the device: `host`, as
 * a program takes no GPU that it has not named; and for the log: warnings alone. Throws CONFIG_INVALID that names the field, or the directory that holds no checkpoint.
 */
export function workerConfig(input: WorkerConfigInput = {}): WorkerConfig {
  const {
    modelDir,
    http,
    access,
    kv,
    transfer: kept = {},
    ...given
  } = checkInput(WORKER, input, 'worker configuration');
  const [shared, own] = split(given, SHARED);
  const { bind, announceHost, rank, wireLayout = DEFAULTS.wireLayout, ...rest } = kept;
  const listener = kv ?? { bind, announceHost, rank };
  const transfer = completeTransfer({ wireLayout, ...rest, ...shared, ...listener });
  const defaults = defaultsOf(WORKER_OPTIONS);
  const { role = defaults.role, executor } = own;
  const options = { ...defaults, role, executor, device: transfer.device, model: modelDir };
  const complete = toWorkerConfig(options, { env: {}, demoModelDir });
  return {
    ...complete,
    http,
    access: { ...complete.access, ...withoutUndefined(access) },
    httpAnnounceHost: hostForOthers(http.host),
    ...own,
    transfer,
  };
}

const DEFAULTS = fieldsOf(WORKER_OPTIONS, defaultsOf(WORKER_OPTIONS)).transfer;

/** Blocks leave as they lie in the cache, unless `wireLayout` is given: whose cache it is, this cannot know. */
function completeTransfer(given: z.output<typeof TRANSFER>): TransferOptions {
  const { wireLayout: _, ...defaults } = DEFAULTS;
  const { bind = LOOPBACK, timeouts = {}, limits = {}, log = {}, ...rest } = given;
  return {
    ...defaults,
    device: 'host',
    bind,
    announceHost: hostForOthers(bind.host),
    rank: 0,
    ...withoutUndefined(rest),
    timeouts: { ...defaults.timeouts, ...withoutUndefined(timeouts) },
    limits: { ...DEFAULT_LIMITS, ...withoutUndefined(limits) },
    log: { ...QUIET_LOG, ...withoutUndefined(log) },
  };
}

/** The fields that `keys` has, and the others. */
function split<F extends object, K extends string>(
  fields: F,
  keys: Readonly<Record<K, unknown>>,
): [Pick<F, K & keyof F>, Omit<F, K>] {
  const [those, others] = [true, false].map((wanted) =>
    Object.fromEntries(Object.entries(fields).filter(([key]) => key in keys === wanted)),
  );
  return [those as Pick<F, K & keyof F>, others as Omit<F, K>];
}

function isFingerprint(value: unknown): boolean {
  return typeof value === 'object' && value !== null && 'digest' in value && typeof value.digest === 'string';
}
