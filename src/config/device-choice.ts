/**
 * What `--device auto` means: the first visible GPU, the host where none is visible, an error where one is visible that cannot be used.
 * Pure: `cli/device-auto.ts` asks the machine.
 */
import { type ErrorCode, type ErrorData, PdError, unreachable } from '../errors.ts';

/** What the CUDA driver says of this process's GPUs. */
export type DriverAnswer =
  /** It was not asked: every GPU is hidden, or nothing here looks like one. */
  | { readonly kind: 'not-asked' }
  /** Its library cannot be loaded. */
  | { readonly kind: 'not-loadable'; readonly error: ErrorData }
  /** It runs and reports none; `unhidden`: how many it reports without CUDA_VISIBLE_DEVICES. */
  | { readonly kind: 'no-gpu'; readonly unhidden: number }
  /** It fails otherwise, crashes or hangs: whether there is a GPU is unknown. */
  | { readonly kind: 'fails'; readonly error: ErrorData }
  /** `problem`: why a worker could not use them, such as a library that is missing. */
  | { readonly kind: 'gpus'; readonly names: readonly string[]; readonly problem?: ErrorData };

export interface GpuFacts {
  /** CUDA_VISIBLE_DEVICES; undefined: every GPU is meant. */
  readonly visibleDevices: string | undefined;
  /** By which the kernel offers GPUs to this process: `/dev/nvidia0`. */
  readonly deviceFiles: readonly string[];
  readonly driver: DriverAnswer;
}

export interface DeviceWish {
  /** `cuda`: a GPU for each, or an error. */
  readonly device: 'auto' | 'cuda';
  /** By name, in the order in which GPUs are given: one each. Never empty. */
  readonly workers: readonly string[];
  /** What was asked to compute; absent: as the device. */
  readonly executor?: 'host' | 'cuda';
}

export interface DeviceChoice {
  /** `host` or `cuda:N`, one per worker. */
  readonly devices: readonly string[];
  /** For the log: what was chosen, by whom and why. */
  readonly line: string;
  /** The GPU was not named by anyone: an error in using it says how to run without one. */
  readonly automaticGpu: boolean;
}

/** Whether CUDA_VISIBLE_DEVICES says that no GPU is wanted: empty, negative, or one of the words that people write for it. */
export function hidesEveryGpu(visibleDevices: string | undefined): boolean {
  return visibleDevices !== undefined && /^\s*($|-|none$|void$|nodevfiles$)/i.test(visibleDevices);
}

/**
 * Throws DEVICE_UNAVAILABLE, LIBRARY_NOT_FOUND, LIBRARY_TOO_OLD and the like where a visible GPU cannot be used or there are fewer than
 * workers, and where none is visible though one was asked for. Each names `--device host`.
 */
export function chooseDevices(wish: DeviceWish, facts: GpuFacts): DeviceChoice {
  const { visibleDevices, deviceFiles, driver } = facts;
  const by = `(--device ${wish.device})`;
  const [file] = deviceFiles;

  if (hidesEveryGpu(visibleDevices)) {
    const variable = visibleDevices?.trim()
      ? `CUDA_VISIBLE_DEVICES=${visibleDevices}`
      : 'CUDA_VISIBLE_DEVICES, empty,';
    return onHost(wish, `${variable} hides every GPU`);
  }
  switch (driver.kind) {
    case 'not-asked':
      return onHost(
        wish,
        `there is no NVIDIA device file in /dev${visibleDevices === undefined ? '' : ` for CUDA_VISIBLE_DEVICES=${visibleDevices} to name`}`,
      );
    case 'not-loadable':
      if (file === undefined) return onHost(wish, driver.error.message, driver.error.code);
      throw unusable(wish, `${file} is here, but ${driver.error.message}`, driver.error);
    case 'no-gpu':
      if (driver.unhidden > 0) {
        throw unusable(
          wish,
          `CUDA_VISIBLE_DEVICES=${visibleDevices} names no GPU of this machine, which has ${counted(driver.unhidden)}`,
        );
      }
      if (file === undefined) return onHost(wish, 'the CUDA driver reports none');
      throw unusable(
        wish,
        `${file} is here, but the CUDA driver reports no GPU (may this user open the file? does nvidia-smi work?)`,
      );
    case 'fails':
      throw unusable(wish, `the CUDA driver cannot be asked for GPUs: ${driver.error.message}`, driver.error);
    case 'gpus': {
      const { names, problem } = driver;
      if (problem) {
        throw unusable(
          wish,
          `a GPU is visible (${names[0]}), but cannot be used: ${problem.message}`,
          problem,
        );
      }
      if (names.length < wish.workers.length) throw tooFew(wish, facts, names);
      const devices = wish.workers.map((_, i) => `cuda:${i}`);
      const automaticGpu = wish.device === 'auto';
      if (wish.workers.length > 1) {
        const each = wish.workers.map((worker, i) => `cuda:${i} (${names[i]}) for ${worker}`);
        return { devices, line: `Device: a GPU each, ${each.join(', ')} ${by}`, automaticGpu };
      }
      const which = names.length === 1 ? 'the only' : `the first of ${names.length}`;
      const seen = visibleDevices === undefined ? '' : `, CUDA_VISIBLE_DEVICES=${visibleDevices}`;
      const line = `Device: cuda:0 (${names[0]}), ${which} visible GPU${names.length === 1 ? '' : 's'}${seen} ${by}`;
      return { devices, line, automaticGpu };
    }
    default:
      return unreachable(driver, 'answer of the CUDA driver');
  }
}

/** For a device that was named. */
export function namedDevice(device: string, workers = 1): DeviceChoice {
  const devices = Array.from({ length: workers }, () => device);
  const shared = workers > 1 && device !== 'host' ? `, which ${workers} workers share` : '';
  return { devices, line: `Device: ${device}${shared} (--device ${device})`, automaticGpu: false };
}

/** What a GPU may fail with when it comes to be used. */
const OF_A_GPU: readonly ErrorCode[] = [
  'DEVICE_UNAVAILABLE',
  'LIBRARY_NOT_FOUND',
  'LIBRARY_TOO_OLD',
  'OUT_OF_DEVICE_MEMORY',
  'CUDA_ERROR',
  'NCCL_ERROR',
];

/** The error of a start on a GPU that nobody named, with the way to do without; any other error as it is. */
export function withWayOut(error: PdError, { automaticGpu, devices }: DeviceChoice): PdError {
  // A program of its own reports its error in words.
  const code = /\b([A-Z]+_[A-Z_]+): /.exec(
    error.code === 'PROGRAM_FAILED' ? error.message : `${error.code}: `,
  )?.[1];
  if (!automaticGpu || !OF_A_GPU.some((known) => known === code)) return error;
  const all = devices.join(' and ');
  const message = `${error.message}\n  --device auto chose ${all}; to serve without a GPU: --device host`;
  return new PdError(error.code, message, error.context, { cause: error });
}

function onHost(wish: DeviceWish, why: string, code: ErrorCode = 'DEVICE_UNAVAILABLE'): DeviceChoice {
  const { device, executor, workers } = wish;
  if (device === 'cuda') {
    throw new PdError(code, `--device cuda: no GPU can be used here: ${why}. Without one: --device host`);
  }
  if (executor === 'cuda') {
    throw new PdError(
      code,
      `--executor cuda needs a GPU, and none is visible: ${why}. To compute on the host: --device host without --executor`,
    );
  }
  const line = `Device: host, as no GPU is visible: ${why} (--device auto)`;
  return { devices: workers.map(() => 'host'), line, automaticGpu: false };
}

function unusable({ device }: DeviceWish, why: string, cause?: ErrorData): PdError {
  // A call of the driver that failed: to the user there is no device.
  const code = cause === undefined || cause.code === 'CUDA_ERROR' ? 'DEVICE_UNAVAILABLE' : cause.code;
  return new PdError(
    code,
    `--device ${device}: ${why}. To serve without a GPU: --device host`,
    cause?.context,
  );
}

function tooFew(
  { device, workers }: DeviceWish,
  { visibleDevices }: GpuFacts,
  names: readonly string[],
): PdError {
  const here = names.map((name, i) => `cuda:${i} ${name}`).join(', ');
  const lacking = workers.slice(names.length).map((worker, i) => `cuda:${names.length + i} for ${worker}`);
  const variable = visibleDevices === undefined ? '' : `; CUDA_VISIBLE_DEVICES=${visibleDevices}`;
  return new PdError(
    'DEVICE_UNAVAILABLE',
    `--device ${device}: ${workers.length} workers want a GPU each, and this process sees ${counted(names.length)} (${here}${variable}): there is no ${lacking.join(', no ')}. ` +
      'Start fewer, or serve all without a GPU: --device host',
  );
}

const counted = (count: number) => `${count} ${count === 1 ? 'GPU' : 'GPUs'}`;
