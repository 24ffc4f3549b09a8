/** Options of pd-bench: those common to all parts, and each part's own. */

import { bytes, device, duration, integer, type Kind, oneOf, text, toggle } from '../../src/config/kinds.ts';
import { defineOptions, option, type ValuesOf } from '../../src/config/options.ts';
import { DEFAULT_TIMEOUTS } from '../../src/config/transfer-options.ts';
import { PdError } from '../../src/errors.ts';
import { LOG_LEVELS } from '../../src/observability/log-options.ts';
import { type NativeTransport, TRANSPORTS } from '../../src/transfer/native/messages.ts';
import { SEND_TYPES } from '../../src/wire/messages.ts';
import { z } from '../../src/zod.ts';
import type { Progress } from '../measure/progress.ts';
import type { BenchOptions } from '../transfer/bench.ts';
import { DEFAULT_EXCHANGE } from '../transfer/exchange.ts';
import { DEFAULT_FAULTS } from '../transfer/faults.ts';
import { DEFAULT_INTERFERENCE } from '../transfer/interference.ts';
import { COMPUTE_LOOPS } from '../transfer/messages.ts';
import { blocksOf, MODEL_NAMES, modelShape } from '../transfer/shape.ts';
import { DEFAULT_SOAK } from '../transfer/soak.ts';
import { DEFAULT_TRANSFER, SOURCES, type TransferSettings, WIRES } from '../transfer/transfer.ts';

/** Several in one argument: `16,256`. No duplicates. */
export function commas<T>(kind: Kind<T>): Kind<readonly T[]> {
  const allowed = `${kind.allowed}; several are separated by commas`;
  return {
    schema: z.string().transform((value, context): readonly T[] => {
      const items = value.split(',').map((item) => kind.schema.safeParse(item.trim()));
      const values = items.flatMap((item) => (item.success ? [item.data] : []));
      if (values.length === items.length && new Set(values).size === values.length) return values;
      context.addIssue({ code: 'custom', message: `expected ${allowed}` });
      return z.NEVER;
    }),
    allowed,
    argument: `${kind.argument ?? 'value'},...`,
    render: (values) => values.map((value) => kind.render(value)).join(','),
  };
}

const WHERE = 'Where and what';
const OUTPUT = 'Output';

const COMMON = defineOptions({
  device: option({
    kind: oneOf(['cuda', 'host']),
    help: 'cuda: the first two GPUs; host: two processes on this machine, without a GPU',
    group: WHERE,
    defaultText: 'cuda',
  }),
  devices: option({
    kind: text('device,device', 'two GPUs such as cuda:0,cuda:1'),
    help: "the producer's and the consumer's device, instead of --device; one GPU for both with --wire native --transport direct",
    group: WHERE,
  }),
  shape: option({
    kind: oneOf(MODEL_NAMES),
    help: 'model whose KV shape is used',
    group: WHERE,
    default: 'llama-3-8b',
  }),
  blockSize: option({ kind: integer(1, 1_024), help: 'tokens per block', group: WHERE, default: 16 }),
  layers: option({
    kind: integer(1, 1_000),
    help: 'layers, instead of those of the shape',
    group: WHERE,
  }),
  ncclNumChannels: option({
    kind: integer(1, 64),
    help: 'NCCL channels per pair',
    group: WHERE,
    default: 16,
  }),
  kvBufferSize: option({
    kind: bytes(),
    help: 'device memory of each engine for received KV; what does not fit spills into host memory',
    group: WHERE,
    defaultText: '20GB, on the host 4GB',
  }),
  logLevel: option({
    kind: oneOf(LOG_LEVELS),
    help: "level of the engines' logs, on stderr",
    group: OUTPUT,
    default: 'error',
  }),
  json: option({ kind: toggle(), help: 'print the result as JSON', group: OUTPUT, default: false }),
  output: option({ kind: text('file'), help: 'write the JSON to a file as well', group: OUTPUT }),
});

export const TRANSFER_OPTIONS = defineOptions({
  ...COMMON,
  wire: option({
    kind: commas(oneOf(WIRES)),
    help: "native: the product's hand-over, connector to connector; frozen: vLLM's wire, engine to engine",
    group: 'Measurement',
    default: DEFAULT_TRANSFER.wires,
  }),
  transport: option({
    kind: commas(oneOf(TRANSPORTS)),
    help: 'ways of the native hand-over',
    group: 'Measurement',
    defaultText: 'direct,nccl, on the host host',
  }),
  inFlight: option({
    kind: commas(integer(1, 64)),
    help: 'native requests asked for at once',
    group: 'Measurement',
    default: [1, 8, 32],
  }),
  sendType: option({
    kind: commas(oneOf(SEND_TYPES)),
    help: 'send types of the frozen wire',
    group: 'Measurement',
    default: DEFAULT_TRANSFER.sendTypes,
  }),
  source: option({
    kind: commas(oneOf(SOURCES)),
    help: 'by the frozen wire; paged: gather and scatter blocks; flat: dense tensors',
    group: 'Measurement',
    default: DEFAULT_TRANSFER.sources,
  }),
  tokens: option({
    kind: commas(integer(1, 1_000_000, 'n')),
    help: 'tokens of one request',
    group: 'Measurement',
    defaultText: '16,256,1024,4096,16384, on the host up to 4096',
  }),
  rounds: option({
    kind: integer(3, 10_000),
    help: 'timed rounds per row',
    group: 'Measurement',
    default: DEFAULT_TRANSFER.rounds,
  }),
  warmUp: option({
    kind: integer(1, 1_000),
    help: 'warm-up rounds before those',
    group: 'Measurement',
    default: DEFAULT_TRANSFER.warmUp,
  }),
});

export const EXCHANGE_OPTIONS = defineOptions({
  ...COMMON,
  tensors: option({
    kind: integer(1, 10_000),
    help: 'tensors sent in each direction at once',
    group: 'Measurement',
    default: DEFAULT_EXCHANGE.tensors,
  }),
  tensorBytes: option({
    kind: bytes(1),
    help: 'bytes of each of those tensors',
    group: 'Measurement',
    default: DEFAULT_EXCHANGE.tensorBytes,
  }),
  crossingBytes: option({
    kind: bytes(1),
    help: 'bytes of each tensor between 2 producers and 2 consumers',
    group: 'Measurement',
    default: DEFAULT_EXCHANGE.crossingBytes,
  }),
  crossingTensors: option({
    kind: integer(1, 1_000),
    help: 'tensors from each producer to each consumer',
    group: 'Measurement',
    default: DEFAULT_EXCHANGE.crossingTensors,
  }),
  crossingRounds: option({
    kind: integer(1, 1_000),
    help: 'rounds of the crossing',
    group: 'Measurement',
    default: DEFAULT_EXCHANGE.crossingRounds,
  }),
});

export const SOAK_OPTIONS = defineOptions({
  ...COMMON,
  sendType: option({
    kind: oneOf(SEND_TYPES),
    help: 'send type',
    group: 'Measurement',
    default: DEFAULT_SOAK.sendType,
  }),
  requests: option({
    kind: integer(3, 1_000_000),
    help: 'requests in all',
    group: 'Measurement',
    default: DEFAULT_SOAK.requests,
  }),
  maxTokens: option({
    kind: integer(1, 1_000_000),
    help: 'the longest request',
    group: 'Measurement',
    default: DEFAULT_SOAK.maxTokens,
  }),
  settled: option({
    kind: integer(2, 1_000_000),
    help: 'requests after which resident memory is read, for comparison with the end',
    group: 'Measurement',
    default: DEFAULT_SOAK.settled,
  }),
});

export const FAULTS_OPTIONS = defineOptions({
  ...COMMON,
  tokens: option({
    kind: integer(1, 1_000_000),
    help: 'tokens of one request',
    group: 'Measurement',
    default: DEFAULT_FAULTS.tokens,
  }),
  deadline: option({
    kind: duration(100),
    help: "deadline of each wait, instead of the engines' longer defaults",
    group: 'Measurement',
    default: DEFAULT_FAULTS.deadlineMs,
  }),
  kernel: option({
    kind: duration(1),
    help: 'run time of the long kernel',
    group: 'Measurement',
    default: DEFAULT_FAULTS.kernelMs,
  }),
});

export const INTERFERENCE_OPTIONS = defineOptions({
  ...COMMON,
  loop: option({
    kind: commas(oneOf(COMPUTE_LOOPS)),
    help: 'matmul: limited by arithmetic, like prefill; memory: limited by bandwidth, like decode',
    group: 'Measurement',
    default: DEFAULT_INTERFERENCE.loops,
  }),
  time: option({
    kind: duration(10),
    help: 'duration of each measurement',
    group: 'Measurement',
    default: DEFAULT_INTERFERENCE.ms,
  }),
  tokens: option({
    kind: integer(1, 1_000_000),
    help: 'tokens of one request',
    group: 'Measurement',
    default: DEFAULT_INTERFERENCE.tokens,
  }),
  window: option({
    kind: integer(1, 1_000),
    help: 'requests in flight',
    group: 'Measurement',
    default: DEFAULT_INTERFERENCE.window,
  }),
});

type CommonValues = ValuesOf<typeof COMMON>;

/** Throws CONFIG_INVALID for devices between which nothing can move. */
export function benchOptions(
  values: CommonValues & Partial<Pick<ValuesOf<typeof TRANSFER_OPTIONS>, 'wire' | 'transport'>>,
  progress: Progress,
): BenchOptions {
  const { wire, transport } = values;
  const byDirect = wire?.join() === 'native' && transport?.join() === 'direct';
  const devices = devicesOf(values, byDirect);
  const { layers, blockSize } = values;
  const onHost = devices[0] === 'host';
  return {
    devices,
    shape: { ...modelShape(values.shape), blockSize, ...(layers !== undefined && { layers }) },
    kvBufferSize: values.kvBufferSize ?? (onHost ? 4e9 : 2e10),
    memPoolSize: onHost ? 4e9 : 16e9,
    ncclNumChannels: values.ncclNumChannels,
    timeouts: DEFAULT_TIMEOUTS,
    logLevel: values.logLevel,
    progress,
  };
}

/** `--tokens`, or the default for the device: on a host, sizes that fit into it twice. */
export function tokensOf(
  given: readonly number[] | undefined,
  { devices, shape }: BenchOptions,
): readonly number[] {
  const tokens = given ?? (devices[0] === 'host' ? [16, 256, 1_024, 4_096] : DEFAULT_TRANSFER.tokens);
  return [...tokens].sort((a, b) => blocksOf(shape, a) - blocksOf(shape, b));
}

/** Requests of many at once are of 1,024 tokens, or the largest that is measured. */
export function nativeSettingsOf(
  { transport, inFlight, tokens }: ValuesOf<typeof TRANSFER_OPTIONS>,
  options: BenchOptions,
): TransferSettings['native'] {
  const possible: readonly NativeTransport[] = options.devices[0] === 'host' ? ['host'] : ['direct', 'nccl'];
  const transports = transport ?? possible;
  const wrong = transports.find((one) => !possible.includes(one));
  if (wrong !== undefined) {
    const message = `--transport: there is no ${wrong} between ${options.devices.join(' and ')}`;
    throw new PdError('CONFIG_INVALID', message);
  }
  return { transports, inFlight, manyTokens: Math.min(1_024, Math.max(...tokensOf(tokens, options))) };
}

/** `byDirect`: nothing is to go by NCCL. */
function devicesOf({ device: kind, devices }: CommonValues, byDirect: boolean): readonly [string, string] {
  if (kind !== undefined && devices !== undefined) {
    throw new PdError('CONFIG_INVALID', '--device and --devices: give only one of them');
  }
  if (kind === 'host') return ['host', 'host'];
  const names = (devices ?? 'cuda:0,cuda:1').split(',').map((name) => device().schema.safeParse(name));
  const [producer, consumer] = names.map((name) => (name.success ? name.data : undefined));
  if (names.length !== 2 || producer === undefined || consumer === undefined) {
    throw new PdError(
      'CONFIG_INVALID',
      `--devices: ${JSON.stringify(devices)} is not two devices such as cuda:0,cuda:1`,
    );
  }
  if ((producer === 'host') !== (consumer === 'host')) {
    throw new PdError('CONFIG_INVALID', `--devices: ${producer} and ${consumer} share no transport`);
  }
  if (producer === consumer && producer !== 'host' && !byDirect) {
    throw new PdError(
      'CONFIG_INVALID',
      `--devices: both are ${producer}, and NCCL refuses to connect two ranks on one GPU; --wire native --transport direct does without`,
    );
  }
  return [producer, consumer];
}
