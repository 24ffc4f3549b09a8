/**
 * The options of `pd-worker`: one table for flags, environment, config file and what programs give in code. A new option is a row here
 * and its field in WorkerConfig (worker-config.ts) or TransferOptions (transfer-options.ts).
 */
import { WIRE_LAYOUTS } from '../kv/families.ts';
import { CALL_DIALECTS } from '../parsing/calls.ts';
import { REASONING_DIALECTS } from '../parsing/reasoning.ts';
import { SUFFIXED_IDS } from '../wire/ids.ts';
import { KV_EVENT_FORMS } from '../wire/kv-events.ts';
import { SEND_TYPES } from '../wire/messages.ts';
import { ACCESS_OPTIONS } from './access-options.ts';
import { logOptions, type TableOf, TRACE_OPTIONS } from './fields.ts';
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
import { defineOptions, grouped, option, type ValuesOf } from './options.ts';
import { DEFAULT_LIMITS, DEFAULT_TIMEOUTS, KV_KEYS, type TransferTimeouts } from './transfer-options.ts';
import {
  EXECUTORS,
  LOAD_FAILURE_POLICIES,
  TRANSPORT_CHOICES,
  WIRE_CHOICES,
  WORKER_ROLES,
  type WorkerConfig,
} from './worker-config.ts';

const deadline = <Name extends keyof TransferTimeouts>(name: Name, help: string) =>
  option({
    field: `transfer.timeouts.${name}` as const,
    kind: duration(1),
    help,
    default: DEFAULT_TIMEOUTS[name],
  });

export const WORKER_OPTIONS = defineOptions({
  role: option({
    kind: oneOf(WORKER_ROLES),
    help: 'compute prompts, generate, or both undivided',
    default: 'both',
  }),
  config: option({ field: false, kind: text('file'), help: 'JSON file of options' }),
  ...grouped('Model', {
    model: option({
      field: false,
      kind: text('dir'),
      help: 'directory of a Hugging Face checkpoint',
      defaultText: 'the bundled demo model',
    }),
    servedModelName: option({
      field: 'servedModelNames',
      kind: listOf(text('name'), 1),
      help: 'ids that requests may name; the first is echoed',
      defaultText: '--model as given, or demo',
    }),
    device: option({
      field: 'transfer.device',
      kind: deviceOrAuto(),
      help: 'where KV lives: host, cuda:N, or auto: the first visible GPU, host where there is none',
      default: 'auto',
    }),
    executor: option({
      kind: oneOf(EXECUTORS),
      help: 'what computes; host with a cuda device moves KV through GPU memory',
      defaultText: 'as --device',
    }),
    maxModelLen: option({
      kind: integer(2, 2 ** 24, 'tokens'),
      help: 'most tokens of one sequence, prompt and output',
      defaultText: "the model's own",
    }),
    toolCallParser: option({
      kind: oneOf(['auto', 'none', ...CALL_DIALECTS]),
      help: 'how the model writes calls of tools; auto: as its chat template says',
      default: 'auto',
    }),
    reasoningParser: option({
      kind: oneOf(['auto', 'none', ...REASONING_DIALECTS]),
      help: 'how it marks what it thinks; auto: as its chat template says; none: as part of the answer',
      default: 'auto',
    }),
    debugLogits: option({ kind: text('dir'), help: 'logits of every sampled token go here: slow' }),
  }),
  ...grouped('HTTP server', {
    host: option({ field: false, kind: text('host'), help: 'address to bind', default: '0.0.0.0' }),
    port: option({
      field: false,
      kind: port(),
      help: 'port to bind, 0 for any free one',
      defaultText: '8081 producer, 8083 consumer, 8080 both',
    }),
    httpAnnounceHost: option({
      kind: text('host'),
      help: 'host told to the proxy',
      defaultText: "PD_HOST_IP, or the one bound, or this machine's address",
    }),
    debugState: option({
      field: false,
      kind: toggle(),
      help: 'answer GET /debug/state to clients on this machine',
      default: false,
    }),
    debugStateRemote: option({ field: false, kind: toggle(), help: 'and to any client', default: false }),
  }),
  ...ACCESS_OPTIONS,
  ...grouped('HTTP server', {
    promptIdsFrom: option({
      kind: listOf(addressRange()),
      help: 'proxies (addresses, or ranges such as 10.0.0.0/8) whose token ids of a prompt are taken for its text, unchecked',
      defaultText: 'every prompt is tokenized here',
    }),
  }),
  ...grouped('KV transfer', {
    kvHost: option({
      field: false,
      kind: text('host'),
      help: 'address that the KV listener binds',
      defaultText: "this machine's address",
    }),
    kvPort: option({ field: false, kind: port(), help: 'base port of the KV listener', default: 14_579 }),
    kvAnnounceHost: option({
      field: false,
      kind: text('host'),
      help: 'KV host told to others',
      defaultText: 'PD_HOST_IP, or the one bound',
    }),
    proxy: option({
      kind: listOf(hostPort()),
      help: 'discovery addresses of proxies, such as 127.0.0.1:30002; of a name, all its addresses',
      default: [],
      defaultText: 'no ping',
    }),
    registry: option({
      kind: etcdAddress(),
      help: 'etcd to register with, for proxies that read it: etcd://host:2379/prefix',
      defaultText: 'none',
    }),
    sendType: option({
      field: 'transfer.sendType',
      kind: oneOf(SEND_TYPES),
      help: 'how KV moves; the same on both ends',
      default: 'PUT_ASYNC',
    }),
    wire: option({
      kind: oneOf(WIRE_CHOICES),
      help: 'between workers of ours: native, written into place; frozen, as with vLLM; auto, native where the proxy sees that both can',
      default: 'auto',
    }),
    transport: option({
      kind: oneOf(TRANSPORT_CHOICES),
      help: "how a native hand-over's bytes travel: direct, into a cache of the same host; nccl; host; auto, the first that both can",
      default: 'auto',
      defaultText: "auto; nccl with vLLM's JSON",
    }),
    kvBufferSize: option({
      field: 'transfer.kvBufferSize',
      kind: bytes(),
      help: 'device memory for received KV',
      default: 1e9,
    }),
    memPoolSizeGb: option({
      field: 'transfer.memPoolSize',
      kind: gibibytes(65_536),
      help: 'host memory (2^30 bytes each) for KV past --kv-buffer-size, taken on demand',
      default: 32 * 2 ** 30,
    }),
    ncclNumChannels: option({
      field: 'transfer.ncclNumChannels',
      kind: integer(1, 64),
      help: 'channels per pair: 16 or 32 on NVLink, 8 on PCIe',
      default: 8,
    }),
    maxPeers: option({
      field: 'transfer.limits.maxPeers',
      kind: integer(1, 65_536),
      help: 'native connections to producers that stay open; beyond it idle ones are closed, and opened again when needed. Frozen pairs stay',
      default: DEFAULT_LIMITS.maxPeers,
    }),
    kvLoadFailure: option({
      field: 'loadFailure',
      kind: oneOf(LOAD_FAILURE_POLICIES),
      help: 'what a consumer does when KV does not come',
      default: 'recompute',
    }),
    randomizeRequestIds: option({
      kind: toggle(),
      help: 'leave the random suffix off engine request ids',
      default: true,
      defaultText: 'suffix on, as vLLM from 0.14',
    }),
    kvKey: option({
      field: 'transfer.kvKey',
      kind: oneOf(KV_KEYS),
      help: 'what KV is known by: the id that both ends share, or the full engine id as in vLLM',
      default: 'transfer',
    }),
    suffixedIds: option({
      field: 'transfer.suffixedIds',
      kind: oneOf(SUFFIXED_IDS),
      help: 'for which request ids of vLLM peers a random suffix is looked for: those that a proxy has made, or any',
      default: 'proxy',
    }),
    wireLayout: option({
      field: 'transfer.wireLayout',
      kind: oneOf(WIRE_LAYOUTS),
      help: 'family of tensors that vLLM peers get, and take two blocks for',
      default: 'kv-first',
    }),
    allowPeers: option({
      field: 'transfer.allowPeers',
      kind: listOf(addressRange()),
      help: 'who may talk to the KV listener: addresses, or ranges such as 10.0.0.0/8',
      defaultText: 'everyone',
    }),
    kvEventsPort: option({
      kind: port(),
      help: 'first of three ports that say what is cached (events, replay, snapshot), 0 for any free ones',
      defaultText: 'not said',
    }),
    kvEventsForm: option({
      kind: oneOf(KV_EVENT_FORMS),
      help: 'map as vLLM from June 2026, positional for older readers',
      default: 'map',
    }),
    kvTransferConfig: option({ field: false, kind: json(), help: "vLLM's JSON, as it is" }),
  }),
  ...grouped('Scheduler and KV cache', {
    maxNumSeqs: option({
      kind: integer(1, 65_536),
      help: 'most sequences in a batch',
      defaultText: '32 on host, 256 on cuda',
    }),
    maxNumBatchedTokens: option({
      kind: integer(1, 2 ** 24, 'tokens'),
      help: 'most tokens in a step; longer prompts go in chunks',
      defaultText: '512 on host, 8192 on cuda',
    }),
    blockSize: option({ kind: integer(1, 1_024, 'tokens'), help: 'tokens per KV block', default: 16 }),
    numBlocks: option({
      kind: integer(2, 2 ** 31 - 1),
      help: 'KV blocks',
      defaultText: 'by what the batch needs, or free GPU memory',
    }),
    gpuMemoryUtilization: option({
      kind: real(0.01, 1),
      help: "share of the GPU's memory that weights, KV and buffers may fill",
      default: 0.9,
    }),
    workersPerGpu: option({
      kind: integer(1, 64),
      help: 'workers that share this GPU, each with an equal part of --gpu-memory-utilization; above 1 only what this worker itself holds counts',
      default: 1,
    }),
    batchInvariant: option({
      kind: toggle(),
      help: 'on cuda, the same bits for a sequence in any batch; slower',
      default: false,
    }),
    enablePrefixCaching: option({
      kind: toggle(),
      help: 'compute equal prompt prefixes anew each time',
      default: true,
      defaultText: 'they are kept',
    }),
  }),
  ...grouped('Deadlines (seconds, or 500ms, 2m)', {
    connectTimeout: deadline('connect', 'reaching a peer'),
    answerTimeout: deadline('answer', "a peer's answer to an announcement"),
    pairInitTimeout: deadline('pairInit', 'opening a pair (communicator init)'),
    kvTransferTimeout: deadline('transfer', 'one tensor on the wire'),
    kvLoadTimeout: deadline('load', 'all KV of a request'),
    kvOrphanTimeout: deadline('orphan', 'KV that no request claims is freed after this'),
    drainTimeout: option({
      field: 'drainTimeoutMs',
      kind: duration(),
      help: 'requests under way when SIGTERM comes',
      default: 30_000,
    }),
    pingInterval: option({
      field: 'pingIntervalMs',
      kind: duration(10),
      help: 'between pings to the proxy',
      default: 3_000,
    }),
  }),
  ...logOptions('transfer.log.'),
  ...TRACE_OPTIONS,
}) satisfies TableOf<WorkerConfig>;

export type WorkerOptions = ValuesOf<typeof WORKER_OPTIONS>;
