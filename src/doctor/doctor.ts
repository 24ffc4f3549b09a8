/** The whole examination: sections in the order of the page. What is wrong becomes a finding and is never thrown. */
import type { DeviceChoice } from '../config/device-choice.ts';
import type { WorkerConfig } from '../config/worker-config.ts';
import type { PdError } from '../errors.ts';
import type { HostPort } from '../net/address.ts';
import { packageVersion } from '../version.ts';
import { addressSection, defaultAddresses, runbookPorts, workerPorts } from './addresses.ts';
import { type DoctorReport, fail, info, ok, reportOf, type Section, warn } from './finding.ts';
import { type Gpus, gpuSections, runtimeSection } from './machine.ts';
import { peerSection } from './peer.ts';
import { proxySection } from './proxy-check.ts';
import { variablesSection } from './variables.ts';
import { workerSection } from './worker-state.ts';

export interface DoctorOptions {
  /** The worker that would run here: its configuration, or what is wrong with it. */
  readonly worker:
    | { readonly config: WorkerConfig; readonly warnings: readonly string[]; readonly choice: DeviceChoice }
    | PdError;
  /** Whether flags or environment describe that worker at all; if not, the runbook's ports are checked. */
  readonly inParticular: boolean;
  readonly peer?: HostPort;
  /** URL of a proxy. */
  readonly proxy?: string;
  /** URL of a worker. */
  readonly workerUrl?: string;
  /** Of each check. */
  readonly timeoutMs: number;
}

/** CUDA is slow to load on a machine with many GPUs. */
const PROBE_TIMEOUT_MS = 60_000;

export async function examine(options: DoctorOptions): Promise<DoctorReport> {
  const { worker, inParticular, timeoutMs } = options;
  const config = 'config' in worker ? worker.config : undefined;
  const device = config?.transfer.device ?? 'host';
  const [[runtime, gpu], ports, ...asked] = await Promise.all([
    machine(device),
    config && inParticular
      ? workerPorts(config)
      : runbookPorts(options.proxy !== undefined || options.workerUrl !== undefined),
    ...(options.peer
      ? [
          peerSection({
            peer: options.peer,
            timeoutMs,
            ...(config && { config }),
            ...(config && inParticular ? { announced: config.transfer.announceHost } : {}),
          }),
        ]
      : []),
    ...(options.proxy === undefined ? [] : [proxySection(options.proxy, timeoutMs)]),
    ...(options.workerUrl === undefined ? [] : [workerSection(options.workerUrl, timeoutMs)]),
  ]);
  const onGpu = gpu.gpus.length > 0 || device !== 'host';
  return reportOf(packageVersion(), [
    runtime,
    ...gpu.sections,
    variablesSection(config?.transfer, onGpu),
    ...(inParticular || !config ? [configSection(worker)] : []),
    config && inParticular ? addressSection(config) : defaultAddresses(),
    ports,
    ...asked,
  ]);
}

/** Without koffi the GPUs cannot be examined. */
async function machine(device: string): Promise<[Section, Gpus]> {
  const runtime = await runtimeSection(PROBE_TIMEOUT_MS);
  const broken = runtime.findings.some(({ level, what }) => level === 'fail' && what.startsWith('koffi'));
  return [runtime, broken ? { sections: [], gpus: [] } : await gpuSections(device, PROBE_TIMEOUT_MS)];
}

function configSection(worker: DoctorOptions['worker']): Section {
  const title = 'Worker';
  if (!('config' in worker)) {
    return { title, findings: [fail(`${worker.code}: ${worker.message}`, worker.hint)] };
  }
  const { role, modelDir, executor, transfer } = worker.config;
  return {
    title,
    findings: [
      ok(`${role} of ${modelDir}, device ${transfer.device}, executor ${executor}, ${transfer.sendType}`),
      info(worker.choice.line),
      ...worker.warnings.map((text) => warn(text)),
    ],
  };
}
