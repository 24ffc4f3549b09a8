/** What pd-launch starts: names, ports, devices and arguments of each program. */
import { chooseDevices, type DeviceChoice, namedDevice } from '../config/device-choice.ts';
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort } from '../net/address.ts';
import { freePorts } from '../net/free-ports.ts';
import { assertBindable, assertReachable } from '../net/port-holder.ts';
import { installedFile } from '../version.ts';
import { gpuFacts, neededLibraries } from './device-auto.ts';
import type { ChildSpec } from './launch-child.ts';

export interface LaunchSettings {
  readonly prefill: number;
  readonly decode: number;
  /** `auto`, `host`, `cuda` (a GPU for each worker, producers first) or `cuda:N` (one GPU, which they share). */
  readonly device: string;
  /** What computes; absent: the device. */
  readonly executor?: 'host' | 'cuda' | undefined;
  /** Of the proxy's clients. */
  readonly apiKeyFile?: string | undefined;
  readonly host: string;
  /** The proxy's HTTP port. */
  readonly port: number;
  readonly discoveryPort: number;
  /** The first worker's HTTP port; its KV port is the next, and so on for the other workers. */
  readonly basePort: number;
  /** Any free ports instead of those three. */
  readonly freePorts: boolean;
  readonly drainTimeoutMs: number;
  readonly logLevel: string;
  readonly logFormat: 'pretty' | 'json';
  /** Checkpoint that the proxy tokenizes by, to place prompts by what workers say they have cached. Absent: there is nothing to choose from. */
  readonly tokenizer?: string;
  /** For each program of a kind, unchanged: `--model DIR --send-type GET`. */
  readonly flags: Readonly<Record<'proxy' | 'producer' | 'consumer', readonly string[]>>;
}

export interface WorkerPlan {
  readonly spec: ChildSpec;
  readonly role: 'producer' | 'consumer';
  readonly httpPort: number;
  readonly kvPort: number;
  readonly device: string;
}

export interface LaunchPlan {
  readonly proxy: { readonly spec: ChildSpec; readonly httpPort: number; readonly discoveryPort: number };
  readonly workers: readonly WorkerPlan[];
}

/** NCCL, which the frozen wire takes too, refuses two ranks on one GPU. */
const SHARING = ['--wire', 'native', '--transport', 'direct'];

/** `cuda:N` is one GPU for all. */
function sharesGpu(device: string): boolean {
  return device.startsWith('cuda:');
}

type DeviceSettings = Pick<LaunchSettings, 'device' | 'executor' | 'prefill' | 'decode'>;

/** One choice for all workers, made before anything starts. Throws what `chooseDevices` throws. */
export async function launchDevices(
  settings: DeviceSettings,
  env: NodeJS.ProcessEnv = process.env,
): Promise<DeviceChoice> {
  const { device, executor } = settings;
  const workers = workerNames(settings);
  if (device !== 'auto' && device !== 'cuda') return namedDevice(device, workers.length);
  const libraries = neededLibraries('producer', executor);
  const facts = await gpuFacts({ insist: device === 'cuda', libraries, env });
  return chooseDevices({ device, workers, ...(executor && { executor }) }, facts);
}

/** In the order in which GPUs are assigned: producers first. */
function workerNames({ prefill, decode }: Pick<LaunchSettings, 'prefill' | 'decode'>): string[] {
  return Array.from({ length: prefill + decode }, (_, i) =>
    i < prefill ? `producer-${i}` : `consumer-${i - prefill}`,
  );
}

/**
 * `devices`: one per worker, producers first. Throws PORT_IN_USE, naming the first port in use and who holds it, and
 * ADDRESS_INVALID for a host that cannot be bound or reached.
 */
export async function planLaunch(settings: LaunchSettings, devices: readonly string[]): Promise<LaunchPlan> {
  const { host, prefill, tokenizer } = settings;
  const names = workerNames(settings);
  const count = 2 + 2 * names.length;
  await assertReachable(host, '--host');
  const ports = settings.freePorts ? await freePorts(count, host) : await fixedPorts(settings);
  const [http, discovery, ...rest] = ports;
  const drain = String(settings.drainTimeoutMs / 1_000);
  const common = [
    ...['--drain-timeout', drain],
    ...['--log-level', settings.logLevel, '--log-format', settings.logFormat],
  ];
  const proxyArgs = [
    ...['--host', host, '--port', String(http), '--discovery-port', String(discovery)],
    ...(settings.apiKeyFile === undefined ? [] : ['--api-key-file', settings.apiKeyFile]),
    ...(tokenizer === undefined ? [] : ['--tokenizer', tokenizer]),
    ...common,
    ...settings.flags.proxy,
  ];
  const pings = formatHostPort(asDestination({ host, port: discovery! }));

  const workers = names.map((name, i): WorkerPlan => {
    const role = i < prefill ? 'producer' : 'consumer';
    const device = devices[i]!;
    const httpPort = rest[2 * i]!;
    const kvPort = rest[2 * i + 1]!;
    const args = [
      ...['--role', role, '--device', device, '--proxy', pings],
      ...['--host', host, '--port', String(httpPort), '--kv-host', host, '--kv-port', String(kvPort)],
      ...(tokenizer === undefined ? [] : ['--kv-events-port', '0']),
      ...(sharesGpu(settings.device) ? [...SHARING, '--workers-per-gpu', String(names.length)] : []),
      ...common,
      ...settings.flags[role],
    ];
    return { spec: program(name, 'pd-worker', args), role, httpPort, kvPort, device };
  });
  return {
    proxy: { spec: program('proxy', 'pd-proxy', proxyArgs), httpPort: http!, discoveryPort: discovery! },
    workers,
  };
}

/** The runbook's ports: 10002 and 30002, then 8081/8082 for the first worker, 8083/8084 for the second. All are free. */
async function fixedPorts(settings: LaunchSettings): Promise<number[]> {
  const { host, basePort } = settings;
  const workers = workerNames(settings).map((name, i) => [
    { port: basePort + 2 * i, what: `HTTP of ${name} (--base-port or --free-ports)` },
    { port: basePort + 2 * i + 1, what: `KV of ${name} (--base-port or --free-ports)` },
  ]);
  const ports = [
    { port: settings.port, what: 'HTTP of the proxy (--port or --free-ports)' },
    { port: settings.discoveryPort, what: 'discovery of the proxy (--discovery-port or --free-ports)' },
    ...workers.flat(),
  ];
  for (const { port, what } of ports) await assertBindable({ host, port }, what);
  return ports.map(({ port }) => port);
}

/** One of the programs in `bin/`. */
function program(name: string, script: string, args: readonly string[]): ChildSpec {
  const path = installedFile(`bin/${script}`);
  if (path === undefined) throw new PdError('INTERNAL', `bin/${script} of this installation is missing`);
  // The launcher's own configuration is not the children's: what concerns them is passed by flag.
  const env = {
    PD_CONFIG: undefined,
    PD_API_KEY_FILE: undefined,
    PD_TLS_CERT: undefined,
    PD_TLS_KEY: undefined,
  };
  return { name, args: [path, ...args], env };
}
