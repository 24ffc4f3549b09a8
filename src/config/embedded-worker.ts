/** Configuration of a worker that another program starts: what `pd-worker` takes from its flags, with defaults that need nothing. */
import { z } from 'zod';
import { WIRE_LAYOUTS } from '../kv/families.ts';
import { demoModelDir } from '../model/demo.ts';
import { asDestination } from '../net/address.ts';
import type { LogOptions, TransferLimits, TransferTimeouts } from '../transfer/types.ts';
import { KV_KEYS, SEND_TYPES } from '../transfer/types.ts';
import { SUFFIXED_IDS } from '../wire/ids.ts';
import {
  type Address,
  address,
  bytes,
  checkInput,
  count,
  device,
  hostForOthers,
  logOptions,
  milliseconds,
  name,
  QUIET_LOG,
  ranges,
  transferLimits,
  transferTimeouts,
  withoutUndefined,
} from './input.ts';
import { toWorkerConfig } from './resolve-worker.ts';
import type { WorkerConfig } from './worker-config.ts';
import { WORKER_OPTIONS, type WorkerOptions } from './worker-options.ts';

/** `WorkerConfig` with every field optional. */
export interface WorkerConfigInput
  extends Partial<Omit<WorkerConfig, 'http' | 'kv' | 'proxy' | 'timeouts' | 'limits' | 'log'>> {
  /** Where HTTP is bound. `127.0.0.1:0`: this machine only, any free port. */
  readonly http?: Address;
  readonly kv?: {
    /** `127.0.0.1:0`. */
    readonly bind?: Address;
    readonly announceHost?: string;
    readonly rank?: number;
  };
  /** Where a proxy takes pings (`PdProxy.discoveryAddress`). Absent: no ping. */
  readonly proxy?: Address;
  readonly timeouts?: Partial<TransferTimeouts>;
  readonly limits?: Partial<TransferLimits>;
  readonly log?: Partial<LogOptions>;
}

const LOOPBACK = { host: '127.0.0.1', port: 0 };

const INPUT = z.strictObject({
  role: z.enum(['producer', 'consumer', 'both']).default('both'),
  modelDir: name.optional(),
  servedModelNames: z.array(name).min(1).optional(),
  device: device.default('host'),
  executor: z.enum(['host', 'cuda']).optional(),
  http: address.default(LOOPBACK),
  kv: z
    .strictObject({
      bind: address.default(LOOPBACK),
      announceHost: name.optional(),
      rank: z.int().min(0).default(0),
    })
    .default({ bind: LOOPBACK, rank: 0 }),
  proxy: address.transform(asDestination).optional(),
  httpAnnounceHost: name.optional(),
  sendType: z.enum(SEND_TYPES).optional(),
  kvBufferSize: bytes.optional(),
  memPoolSize: bytes.optional(),
  ncclNumChannels: z.int().min(1).max(64).optional(),
  wireLayout: z.enum(WIRE_LAYOUTS).optional(),
  kvKey: z.enum(KV_KEYS).optional(),
  suffixedIds: z.enum(SUFFIXED_IDS).optional(),
  allowPeers: ranges.optional(),
  debugState: z.enum(['loopback', 'anyone']).optional(),
  loadFailure: z.enum(['recompute', 'fail']).optional(),
  maxNumSeqs: count.optional(),
  maxNumBatchedTokens: count.optional(),
  maxModelLen: z.int().min(2).optional(),
  debugLogits: name.optional(),
  blockSize: z.int().min(1).max(1_024).optional(),
  numBlocks: z.int().min(2).optional(),
  gpuMemoryUtilization: z.number().min(0.01).max(1).optional(),
  batchInvariant: z.boolean().optional(),
  enablePrefixCaching: z.boolean().optional(),
  randomizeRequestIds: z.boolean().optional(),
  timeouts: transferTimeouts.optional(),
  limits: transferLimits.optional(),
  drainTimeoutMs: milliseconds.optional(),
  pingIntervalMs: milliseconds.min(10).optional(),
  log: logOptions.optional(),
} satisfies Record<keyof WorkerConfigInput, z.ZodType>);

/**
 * A complete worker configuration from a few fields. Defaults are those of `pd-worker --help` (role `both`, the bundled demo model as
 * `demo`), but for what it binds: loopback and any free port, so that nothing is served to a network unasked; for the device: `host`, as
 * a program takes no GPU that it has not named; and for the log: warnings alone. Throws CONFIG_INVALID that names the field, or the directory that holds no checkpoint.
 */
export function workerConfig(input: WorkerConfigInput = {}): WorkerConfig {
  const {
    modelDir,
    http,
    kv,
    timeouts = {},
    limits = {},
    log = {},
    ...given
  } = checkInput(INPUT, input, 'worker configuration');
  const { role, device, executor } = given;
  const options = { ...defaultOptions(), role, device, executor, model: modelDir };
  const defaults = toWorkerConfig(options, { env: {}, demoModelDir });
  return {
    ...defaults,
    http,
    httpAnnounceHost: hostForOthers(http.host),
    kv: { announceHost: hostForOthers(kv.bind.host), ...withoutUndefined(kv) },
    ...given,
    timeouts: { ...defaults.timeouts, ...withoutUndefined(timeouts) },
    limits: { ...defaults.limits, ...withoutUndefined(limits) },
    log: { ...QUIET_LOG, ...withoutUndefined(log) },
  };
}

/** The options of `pd-worker` without a flag, an environment or a file. */
function defaultOptions(): WorkerOptions {
  const entries = Object.entries(WORKER_OPTIONS).map(([option, spec]) => [
    option,
    'default' in spec ? spec.default : undefined,
  ]);
  return Object.fromEntries(entries) as WorkerOptions;
}
