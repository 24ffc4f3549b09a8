/**
 * `--device auto`: which GPUs this machine has, and the worker that flags and environment then mean here. The driver is asked in a child
 * process, since a broken library can crash or hang.
 */
import { readdirSync } from 'node:fs';
import { explicitCandidate, type LibraryName } from '../../ffi/find.ts';
import { demoModelDir } from '../config/demo-model.ts';
import {
  chooseDevices,
  type DeviceChoice,
  type DriverAnswer,
  type GpuFacts,
  hidesEveryGpu,
  namedDevice,
} from '../config/device-choice.ts';
import {
  type GivenWorker,
  type ResolvedWorker,
  resolveGivenWorker,
  type WorkerEnvironment,
} from '../config/resolve-worker.ts';
import { hasCrashed, probe } from '../doctor/probe.ts';
import { PdError } from '../errors.ts';

/** A driver that has to wake eight GPUs is slow. */
const PROBE_TIMEOUT_MS = 60_000;

/** Native, WSL's and Tegra's. */
const DEVICE_FILE = /^(nvidia\d+|dxg|nvhost-gpu)$/;

export interface GpuQuestion {
  /** Ask the driver even if there is no sign of a GPU, to get its own explanation. */
  readonly insist: boolean;
  /** Which libraries a worker would need besides the driver. */
  readonly libraries: readonly LibraryName[];
  readonly env: Readonly<Record<string, string | undefined>>;
  /** Kills the child, and the promise rejects. */
  readonly signal?: AbortSignal;
}

/** Starts no process if there is no sign of a GPU. Rejects only if `signal` fires. */
export async function gpuFacts(question: GpuQuestion): Promise<GpuFacts> {
  const visibleDevices = question.env['CUDA_VISIBLE_DEVICES'];
  const deviceFiles = nvidiaDeviceFiles();
  const sign =
    question.insist || deviceFiles.length > 0 || explicitCandidate('cuda', question.env) !== undefined;
  const driver: DriverAnswer =
    sign && !hidesEveryGpu(visibleDevices) ? await askDriver(question) : { kind: 'not-asked' };
  return { visibleDevices, deviceFiles, driver };
}

/** What such a worker loads besides the driver. One of role `both` has no peers, so it needs no NCCL. */
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
    // None at all, or none of that name? That tells a typo from a machine without GPUs.
    const all = await ask({ ...env, CUDA_VISIBLE_DEVICES: undefined });
    return all.kind === 'gpus' ? { kind: 'no-gpu', unhidden: all.names.length } : answer;
  } catch (cause) {
    signal?.throwIfAborted();
    const error = PdError.from(cause, 'DEVICE_UNAVAILABLE');
    const what = hasCrashed(error) ? `the process that loads the libraries ${error.message}` : error.message;
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

export interface WorkerHere extends ResolvedWorker {
  readonly choice: DeviceChoice;
}

/** Throws what `chooseDevices` and `resolveGivenWorker` throw, and the reason of `signal`. */
export async function resolveWorkerHere(
  given: GivenWorker,
  env: WorkerEnvironment['env'],
  signal?: AbortSignal,
): Promise<WorkerHere> {
  const { device, role, executor } = given.options;
  const choice = device === 'auto' ? await chooseHere() : namedDevice(device);
  const [autoDevice] = choice.devices;
  const resolved = resolveGivenWorker(given, { env, demoModelDir, ...(autoDevice && { autoDevice }) });
  return { ...resolved, choice };

  async function chooseHere(): Promise<DeviceChoice> {
    const libraries = neededLibraries(role, executor);
    const facts = await gpuFacts({ insist: false, libraries, env, ...(signal && { signal }) });
    return chooseDevices({ device: 'auto', workers: ['the worker'], ...(executor && { executor }) }, facts);
  }
}
