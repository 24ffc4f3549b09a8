/** Environment variables that native libraries and workers read: what is set, what each does, and which would stop a worker. */
import { networkInterfaces } from 'node:os';
import { type NativeConfig, nativeEnvironment } from '../device/native-env.ts';
import { type Finding, fail, info, type Section, warn } from './finding.ts';

type Judge = (value: string, context: VariableContext) => Finding;

export interface VariableContext {
  /** False: GPU variables have no effect. */
  readonly onGpu: boolean;
  readonly interfaces: readonly string[];
}

const says =
  (meaning: string): Judge =>
  () =>
    info(meaning);
/** Harmless unless its value is `bad`. */
const unless =
  (bad: string, meaning: string, wrong: string, level: 'warn' | 'fail' = 'warn'): Judge =>
  (value) =>
    value === bad ? { level, what: wrong, fix: 'unset it' } : info(meaning);

/** In the order of the page. */
const KNOWN: Readonly<Record<string, Judge>> = {
  CUDA_VISIBLE_DEVICES: (value, { onGpu }) =>
    onGpu && (value === '' || value.startsWith('-'))
      ? fail('hides every GPU from CUDA', 'unset it, or list the GPUs: CUDA_VISIBLE_DEVICES=0,1')
      : info('the visible GPUs; cuda:0 is the first of them'),
  CUDA_DEVICE_ORDER: says('how GPUs are numbered; PCI_BUS_ID matches nvidia-smi'),
  CUDA_MODULE_LOADING: unless(
    'LAZY',
    'EAGER: kernels load at start',
    'kernels load at their first launch, which blocks while any receive waits for its sender',
  ),
  CUDA_LAUNCH_BLOCKING: unless(
    '1',
    'launches are asynchronous',
    'every launch is synchronous: transfers no longer overlap compute',
  ),
  CUDA_DEVICE_MAX_CONNECTIONS: unless(
    '1',
    'hardware queues of a GPU',
    'one hardware queue: a transfer waiting for its peer may block compute',
  ),
  CUDA_HOME: says('searched for libraries'),
  CUDA_PATH: says('searched for libraries'),
  NCCL_SOCKET_IFNAME: (value, { interfaces }) => interfaceVerdict(value, interfaces),
  NCCL_SOCKET_FAMILY: says('IP version of the bootstrap; must match the peer'),
  NCCL_COMM_BLOCKING: unless(
    '1',
    'communicators are non-blocking',
    'makes communicators blocking: one peer that does not join stops the whole worker',
    'fail',
  ),
  NCCL_COMM_ID: () => warn('ties every communicator to one address', 'unset it'),
  NCCL_P2P_DISABLE: unless(
    '1',
    'GPUs write to each other directly',
    'no peer-to-peer between GPUs: KV goes through host memory',
  ),
  NCCL_P2P_LEVEL: says('how far apart GPUs may be for peer-to-peer'),
  NCCL_SHM_DISABLE: unless('1', 'shared memory is used', 'processes on one host talk over the network'),
  NCCL_CUMEM_ENABLE: unless(
    '0',
    'cuMem API for GPU memory shared between processes',
    'legacy way of sharing GPU memory; must match the peer',
  ),
  NCCL_IB_DISABLE: unless(
    '1',
    'InfiniBand is used',
    'no InfiniBand or RoCE: between machines KV goes over TCP',
  ),
  NCCL_IB_HCA: says('network cards that NCCL uses'),
  NCCL_NET: says('the network that NCCL must use, or fail'),
  NCCL_MIN_CTAS: says('overrides --nccl-num-channels for the whole process'),
  NCCL_MAX_CTAS: says('overrides --nccl-num-channels for the whole process'),
  NCCL_MIN_NCHANNELS: says('overrides --nccl-num-channels for the whole process'),
  NCCL_MAX_NCHANNELS: says('overrides --nccl-num-channels for the whole process'),
  NCCL_BUFFSIZE: says('bytes of a channel buffer; must match the peer'),
  NCCL_PROTO: says("NCCL's protocols; must match the peer"),
  NCCL_DEBUG: says("NCCL's own log on stdout"),
  VLLM_LOGGING_LEVEL: says('log level, unless --log-level is given'),
  VLLM_NCCL_SO_PATH: says('the NCCL library, unless PD_NCCL_LIB is set'),
  VLLM_DISABLE_REQUEST_ID_RANDOMIZATION: says('1: request ids get no random suffix; vLLM consumers need it'),
  PD_HOST_IP: says('the address announced to others'),
  LD_LIBRARY_PATH: says('directories that the loader searches first'),
};

/** Set by NVIDIA's container images to say what they contain; no library reads them. */
const NOT_VARIABLES = /^(CUDA_VERSION|NCCL_VERSION|CUDA_VERSION_\w+)$/;

function interfaceVerdict(value: string, interfaces: readonly string[]): Finding {
  const exclude = value.startsWith('^');
  const exact = /^\^?=/.test(value);
  const names = value
    .replace(/^[\^=]+/, '')
    .split(',')
    .map((name) => name.replace(/:.*$/, ''));
  const found = names.some((name) => interfaces.some((i) => (exact ? i === name : i.startsWith(name))));
  return exclude || found
    ? info("the interface of NCCL's bootstrap; peers must be able to reach its address")
    : fail(
        `names no interface of this machine (${interfaces.join(', ')}): every communicator would fail`,
        'unset it: workers then choose the interface of their KV address',
      );
}

/** NCCL's `=` before a name looks like a typo. */
function assignment([name, value]: readonly [string, string]): string {
  const exact = name === 'NCCL_SOCKET_IFNAME' && value.startsWith('=');
  return `${name}=${value}${exact ? ' (`=`: exactly this name)' : ''}`;
}

export function variablesSection(
  config: NativeConfig | undefined,
  onGpu: boolean,
  env: Readonly<Record<string, string | undefined>> = process.env,
): Section {
  const all = networkInterfaces();
  const context = { onGpu, interfaces: Object.keys(all) };
  const findings: Finding[] = [];
  for (const [name, judge] of Object.entries(KNOWN)) {
    const value = env[name];
    if (value === undefined) continue;
    const { what, ...rest } = judge(value, context);
    findings.push({ ...rest, what: `${name}=${value}  ${what}` });
  }
  for (const [name, value] of Object.entries(env)) {
    if (!/^(NCCL|CUDA)_/.test(name) || name in KNOWN || NOT_VARIABLES.test(name)) continue;
    findings.push(info(`${name}=${value}  passed to the library as is`));
  }
  if (config !== undefined && onGpu) {
    const device = config.device === 'host' ? 'cuda:0' : config.device;
    const ours = Object.entries(nativeEnvironment({ ...config, device }, all)).filter(
      ([name]) => env[name] === undefined,
    );
    if (ours.length > 0) {
      findings.push(info(`set by workers unless you set them: ${ours.map(assignment).join(' ')}`));
    }
  }
  return { title: 'Variables', findings };
}
