/**
 * The options of `pd-worker`: one table for flags, environment, config file and what programs give in code. A new option is a row here
 * and its field in WorkerConfig (worker-config.ts) or TransferOptions (transfer-options.ts).
 */
import { WIRE_LAYOUTS } from '../kv/families.ts';
import { LOG_FORMATS, LOG_LEVELS } from '../observability/log-options.ts';
import { CALL_DIALECTS } from '../parsing/calls.ts';
import { REASONING_DIALECTS } from '../parsing/reasoning.ts';
import { SUFFIXED_IDS } from '../wire/ids.ts';
import { KV_EVENT_FORMS } from '../wire/kv-events.ts';
import { SEND_TYPES } from '../wire/messages.ts';
import { ACCESS_OPTIONS } from './access-options.ts';
import type { TableOf } from './fields.ts';
import {
  addressRange,
  bytes,
  deviceOrAuto,
  duration,
  etcdAddress,
  gibibytes,
  hostPort,
  integer,
  json,
  listOf,
  oneOf,
  port,
  real,
  text,
  toggle,
} from './kinds.ts';
import { defineOptions, option, type ValuesOf } from './options.ts';
import { DEFAULT_LIMITS, DEFAULT_TIMEOUTS, KV_KEYS } from './transfer-options.ts';
import {
  EXECUTORS,
  LOAD_FAILURE_POLICIES,
  TRANSPORT_CHOICES,
  WIRE_CHOICES,
  WORKER_ROLES,
  type WorkerConfig,
} from './worker-config.ts';

const MODEL = 'Model';
const SERVER = 'HTTP server';
const KV = 'KV transfer';
const BATCH = 'Scheduler and KV cache';
const DEADLINES = 'Deadlines (seconds, or 500ms, 2m)';
const LOG = 'Log';

export const WORKER_OPTIONS = defineOptions({
  role: option({
    field: 'role',
    kind: oneOf(WORKER_ROLES),
    help: 'compute prompts, generate, or both undivided',
    default: 'both',
  }),
  config: option({ kind: text('file'), help: 'JSON file of options' }),

  model: option({
    kind: text('dir'),
    group: MODEL,
    help: 'directory of a Hugging Face checkpoint',
    defaultText: 'the bundled demo model',
  }),
  servedModelName: option({
    field: 'servedModelNames',
    kind: listOf(text('name'), 1),
    group: MODEL,
    help: 'ids that requests may name; the first is echoed',
    defaultText: '--model as given, or demo',
  }),
  device: option({
    field: 'transfer.device',
    kind: deviceOrAuto(),
    group: MODEL,
    help: 'where KV lives: host, cuda:N, or auto: the first visible GPU, host where there is none',
    default: 'auto',
  }),
  executor: option({
    field: 'executor',
    kind: oneOf(EXECUTORS),
    group: MODEL,
    help: 'what computes; host with a cuda device moves KV through GPU memory',
    defaultText: 'as --device',
  }),
  maxModelLen: option({
    field: 'maxModelLen',
    kind: integer(2, 2 ** 24, 'tokens'),
    group: MODEL,
    help: 'most tokens of one sequence, prompt and output',
    defaultText: "the model's own",
  }),
  toolCallParser: option({
    field: 'toolCallParser',
    kind: oneOf(['auto', 'none', ...CALL_DIALECTS]),
    group: MODEL,
    help: 'how the model writes calls of tools; auto: as its chat template says',
    default: 'auto',
  }),
  reasoningParser: option({
    field: 'reasoningParser',
    kind: oneOf(['auto', 'none', ...REASONING_DIALECTS]),
    group: MODEL,
    help: 'how it marks what it thinks; auto: as its chat template says; none: as part of the answer',
    default: 'auto',
  }),
  debugLogits: option({
    field: 'debugLogits',
    kind: text('dir'),
    group: MODEL,
    help: 'logits of every sampled token go here: slow',
  }),

  host: option({ kind: text('host'), group: SERVER, help: 'address to bind', default: '0.0.0.0' }),
  port: option({
    kind: port(),
    group: SERVER,
    help: 'port to bind, 0 for any free one',
    defaultText: '8081 producer, 8083 consumer, 8080 both',
  }),
  httpAnnounceHost: option({
    field: 'httpAnnounceHost',
    kind: text('host'),
    group: SERVER,
    help: 'host told to the proxy',
    defaultText: "PD_HOST_IP, or the one bound, or this machine's address",
  }),

  debugState: option({
    kind: toggle(),
    group: SERVER,
    help: 'answer GET /debug/state to clients on this machine',
    default: false,
  }),
  debugStateRemote: option({ kind: toggle(), group: SERVER, help: 'and to any client', default: false }),
  ...ACCESS_OPTIONS,

  promptIdsFrom: option({
    field: 'promptIdsFrom',
    kind: listOf(addressRange()),
    group: SERVER,
    help: 'proxies (addresses, or ranges such as 10.0.0.0/8) whose token ids of a prompt are taken for its text, unchecked',
    defaultText: 'every prompt is tokenized here',
  }),

  kvHost: option({
    kind: text('host'),
    group: KV,
    help: 'address that the KV listener binds',
    defaultText: "this machine's address",
  }),
  kvPort: option({ kind: port(), group: KV, help: 'base port of the KV listener', default: 14_579 }),
  kvAnnounceHost: option({
    kind: text('host'),
    group: KV,
    help: 'KV host told to others',
    defaultText: 'PD_HOST_IP, or the one bound',
  }),
  proxy: option({
    field: 'proxy',
    kind: listOf(hostPort()),
    group: KV,
    help: 'discovery addresses of proxies, such as 127.0.0.1:30002; of a name, all its addresses',
    default: [],
    defaultText: 'no ping',
  }),
  registry: option({
    field: 'registry',
    kind: etcdAddress(),
    group: KV,
    help: 'etcd to register with, for proxies that read it: etcd://host:2379/prefix',
    defaultText: 'none',
  }),
  sendType: option({
    field: 'transfer.sendType',
    kind: oneOf(SEND_TYPES),
    group: KV,
    help: 'how KV moves; the same on both ends',
    default: 'PUT_ASYNC',
  }),
  wire: option({
    field: 'wire',
    kind: oneOf(WIRE_CHOICES),
    group: KV,
    help: 'between workers of ours: native, written into place; frozen, as with vLLM; auto, native where the proxy sees that both can',
    default: 'auto',
  }),
  transport: option({
    field: 'transport',
    kind: oneOf(TRANSPORT_CHOICES),
    group: KV,
    help: "how a native hand-over's bytes travel: direct, into a cache of the same host; nccl; host; auto, the first that both can",
    default: 'auto',
    defaultText: "auto; nccl with vLLM's JSON",
  }),
  kvBufferSize: option({
    field: 'transfer.kvBufferSize',
    kind: bytes(),
    group: KV,
    help: 'device memory for received KV',
    default: 1e9,
  }),
  memPoolSizeGb: option({
    field: 'transfer.memPoolSize',
    kind: gibibytes(65_536),
    group: KV,
    help: 'host memory (2^30 bytes each) for KV past --kv-buffer-size, taken on demand',
    default: 32 * 2 ** 30,
  }),
  ncclNumChannels: option({
    field: 'transfer.ncclNumChannels',
    kind: integer(1, 64),
    group: KV,
    help: 'channels per pair: 16 or 32 on NVLink, 8 on PCIe',
    default: 8,
  }),
  maxPeers: option({
    field: 'transfer.limits.maxPeers',
    kind: integer(1, 65_536),
    group: KV,
    help: 'native connections to producers that stay open; beyond it idle ones are closed, and opened again when needed. Frozen pairs stay',
    default: DEFAULT_LIMITS.maxPeers,
  }),
  kvLoadFailure: option({
    field: 'loadFailure',
    kind: oneOf(LOAD_FAILURE_POLICIES),
    group: KV,
    help: 'what a consumer does when KV does not come',
    default: 'recompute',
  }),
  randomizeRequestIds: option({
    field: 'randomizeRequestIds',
    kind: toggle(),
    group: KV,
    help: 'leave the random suffix off engine request ids',
    default: true,
    defaultText: 'suffix on, as vLLM from 0.14',
  }),
  kvKey: option({
    field: 'transfer.kvKey',
    kind: oneOf(KV_KEYS),
    group: KV,
    help: 'what KV is known by: the id that both ends share, or the full engine id as in vLLM',
    default: 'transfer',
  }),
  suffixedIds: option({
    field: 'transfer.suffixedIds',
    kind: oneOf(SUFFIXED_IDS),
    group: KV,
    help: 'for which request ids of vLLM peers a random suffix is looked for: those that a proxy has made, or any',
    default: 'proxy',
  }),
  wireLayout: option({
    field: 'transfer.wireLayout',
    kind: oneOf(WIRE_LAYOUTS),
    group: KV,
    help: 'family of tensors that vLLM peers get, and take two blocks for',
    default: 'kv-first',
  }),
  allowPeers: option({
    field: 'transfer.allowPeers',
    kind: listOf(addressRange()),
    group: KV,
    help: 'who may talk to the KV listener: addresses, or ranges such as 10.0.0.0/8',
    defaultText: 'everyone',
  }),
  kvEventsPort: option({
    field: 'kvEventsPort',
    kind: port(),
    group: KV,
    help: 'first of three ports that say what is cached (events, replay, snapshot), 0 for any free ones',
    defaultText: 'not said',
  }),
  kvEventsForm: option({
    field: 'kvEventsForm',
    kind: oneOf(KV_EVENT_FORMS),
    group: KV,
    help: 'map as vLLM from June 2026, positional for older readers',
    default: 'map',
  }),
  kvTransferConfig: option({ kind: json(), group: KV, help: "vLLM's JSON, as it is" }),

  maxNumSeqs: option({
    field: 'maxNumSeqs',
    kind: integer(1, 65_536),
    group: BATCH,
    help: 'most sequences in a batch',
    defaultText: '32 on host, 256 on cuda',
  }),
  maxNumBatchedTokens: option({
    field: 'maxNumBatchedTokens',
    kind: integer(1, 2 ** 24, 'tokens'),
    group: BATCH,
    help: 'most tokens in a step; longer prompts go in chunks',
    defaultText: '512 on host, 8192 on cuda',
  }),
  blockSize: option({
    field: 'blockSize',
    kind: integer(1, 1_024, 'tokens'),
    group: BATCH,
    help: 'tokens per KV block',
    default: 16,
  }),
  numBlocks: option({
    field: 'numBlocks',
    kind: integer(2, 2 ** 31 - 1),
    group: BATCH,
    help: 'KV blocks',
    defaultText: 'by what the batch needs, or free GPU memory',
  }),
  gpuMemoryUtilization: option({
    field: 'gpuMemoryUtilization',
    kind: real(0.01, 1),
    group: BATCH,
    help: "share of the GPU's memory that weights, KV and buffers may fill",
    default: 0.9,
  }),
  workersPerGpu: option({
    field: 'workersPerGpu',
    kind: integer(1, 64),
    group: BATCH,
    help: 'workers that share this GPU, each with an equal part of --gpu-memory-utilization; above 1 only what this worker itself holds counts',
    default: 1,
  }),
  batchInvariant: option({
    field: 'batchInvariant',
    kind: toggle(),
    group: BATCH,
    help: 'on cuda, the same bits for a sequence in any batch; slower',
    default: false,
  }),
  enablePrefixCaching: option({
    field: 'enablePrefixCaching',
    kind: toggle(),
    group: BATCH,
    help: 'compute equal prompt prefixes anew each time',
    default: true,
    defaultText: 'they are kept',
  }),

  connectTimeout: option({
    field: 'transfer.timeouts.connect',
    kind: duration(1),
    group: DEADLINES,
    help: 'reaching a peer',
    default: DEFAULT_TIMEOUTS.connect,
  }),
  answerTimeout: option({
    field: 'transfer.timeouts.answer',
    kind: duration(1),
    group: DEADLINES,
    help: "a peer's answer to an announcement",
    default: DEFAULT_TIMEOUTS.answer,
  }),
  pairInitTimeout: option({
    field: 'transfer.timeouts.pairInit',
    kind: duration(1),
    group: DEADLINES,
    help: 'opening a pair (communicator init)',
    default: DEFAULT_TIMEOUTS.pairInit,
  }),
  kvTransferTimeout: option({
    field: 'transfer.timeouts.transfer',
    kind: duration(1),
    group: DEADLINES,
    help: 'one tensor on the wire',
    default: DEFAULT_TIMEOUTS.transfer,
  }),
  kvLoadTimeout: option({
    field: 'transfer.timeouts.load',
    kind: duration(1),
    group: DEADLINES,
    help: 'all KV of a request',
    default: DEFAULT_TIMEOUTS.load,
  }),
  kvOrphanTimeout: option({
    field: 'transfer.timeouts.orphan',
    kind: duration(1),
    group: DEADLINES,
    help: 'KV that no request claims is freed after this',
    default: DEFAULT_TIMEOUTS.orphan,
  }),
  drainTimeout: option({
    field: 'drainTimeoutMs',
    kind: duration(),
    group: DEADLINES,
    help: 'requests under way when SIGTERM comes',
    default: 30_000,
  }),
  pingInterval: option({
    field: 'pingIntervalMs',
    kind: duration(10),
    group: DEADLINES,
    help: 'between pings to the proxy',
    default: 3_000,
  }),

  logLevel: option({
    field: 'transfer.log.level',
    kind: oneOf(LOG_LEVELS),
    group: LOG,
    help: 'least level logged',
    default: 'info',
    defaultText: 'VLLM_LOGGING_LEVEL, or info',
  }),
  logFormat: option({
    field: 'transfer.log.format',
    kind: oneOf(LOG_FORMATS),
    group: LOG,
    help: 'pretty for people, json for collectors, auto by whether stdout is a terminal',
    default: 'auto',
  }),
} satisfies TableOf<WorkerConfig>);

export type WorkerOptions = ValuesOf<typeof WORKER_OPTIONS>;
