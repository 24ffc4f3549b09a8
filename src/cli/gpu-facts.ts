/** What this machine has of GPUs, for `--device auto`: asked of the driver in a child process, since a broken library can crash or hang. */
import { readdirSync } from 'node:fs';
import { explicitCandidate, type LibraryName } from '../../ffi/find.ts';
import { type DriverAnswer, type GpuFacts, hidesEveryGpu } from '../config/device-choice.ts';
import { hasCrashed, probe } from '../doctor/probe.ts';
import { PdError } from '../errors.ts';

/** A driver that has to wake eight GPUs takes its time. */
const PROBE_TIMEOUT_MS = 60_000;

/** NVIDIA's own, WSL's and Tegra's. */
const DEVICE_FILE = /^(nvidia\d+|dxg|nvhost-gpu)$/;

export interface GpuQuestion {
  /** Ask the driver even where there is no sign of a GPU: for its own words of why. */
  readonly insist: boolean;
  /** Which libraries a worker would need besides the driver. */
  readonly libraries: readonly LibraryName[];
  readonly env: Readonly<Record<string, string | undefined>>;
  /** Gives the question up: the child is killed, and the promise rejects. */
  readonly signal?: AbortSignal;
}

/** Without any sign of a GPU no process is started. Rejects only where `signal` fires. */
export async function gpuFacts(question: GpuQuestion): Promise<GpuFacts> {
  const visibleDevices = question.env['CUDA_VISIBLE_DEVICES'];
  const deviceFiles = nvidiaDeviceFiles();
  const sign =
    question.insist || deviceFiles.length > 0 || explicitCandidate('cuda', question.env) !== undefined;
  const driver: DriverAnswer =
    sign && !hidesEveryGpu(visibleDevices) ? await askDriver(question) : { kind: 'not-asked' };
  return { visibleDevices, deviceFiles, driver };
}

/** What a worker of this kind loads besides the driver. An undivided one has no peers, so it needs no NCCL. */
export function neededLibraries(
  role: 'producer' | 'consumer' | 'both',
  executor: 'host' | 'cuda' = 'cuda',
): LibraryName[] {
  return [
    'cudart',
    ...(executor === 'cuda' ? (['cublas'] as const) : []),
    ...(role === 'both' ? [] : (['nccl'] as const)),
  ];
}

async function askDriver({ env, libraries, signal }: GpuQuestion): Promise<DriverAnswer> {
  const ask = (variables: GpuQuestion['env']) =>
    probe('visible-gpus', PROBE_TIMEOUT_MS, { args: libraries, env: variables, ...(signal && { signal }) });
  try {
    const answer = await ask(env);
    if (answer.kind !== 'no-gpu' || env['CUDA_VISIBLE_DEVICES'] === undefined) return answer;
    // None at all, or none of that name? It tells a slip from a machine without GPUs.
    const all = await ask({ ...env, CUDA_VISIBLE_DEVICES: undefined });
    return all.kind === 'gpus' ? { kind: 'no-gpu', unhidden: all.names.length } : answer;
  } catch (cause) {
    signal?.throwIfAborted();
    const error = PdError.from(cause, 'DEVICE_UNAVAILABLE');
    const what = hasCrashed(error) ? `the process that loads its libraries ${error.message}` : error.message;
    return { kind: 'fails', error: { code: 'DEVICE_UNAVAILABLE', message: what, context: error.context } };
  }
}

function nvidiaDeviceFiles(): string[] {
  try {
    return readdirSync('/dev')
      .filter((name) => DEVICE_FILE.test(name))
      .map((name) => `/dev/${name}`);
  } catch {
    return []; // not even a /dev
  }
}
