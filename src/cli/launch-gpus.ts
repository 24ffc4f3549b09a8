/** Whether this machine has the GPUs that pd-launch would give its workers: asked before anything starts, in a child process. */
import { probe } from '../doctor/probe.ts';
import { PdError } from '../errors.ts';
import type { LaunchSettings } from './launch-plan.ts';

const PROBE_TIMEOUT_MS = 60_000;

type GpuSettings = Pick<LaunchSettings, 'device' | 'prefill' | 'decode'>;

/**
 * Nothing to check for `host`. Throws DEVICE_UNAVAILABLE where there are too few GPUs, by name; LIBRARY_NOT_FOUND and others where CUDA
 * cannot be used; CONFIG_INVALID for `cuda:N`, one GPU for all.
 */
export async function assertGpus(settings: GpuSettings): Promise<void> {
  const { device, prefill, decode } = settings;
  if (device === 'host') return;
  if (device !== 'cuda') {
    throw new PdError(
      'CONFIG_INVALID',
      `--device ${device} puts producer and consumer on one GPU, where NCCL refuses to join them: --device cuda gives each its own (CUDA_VISIBLE_DEVICES chooses which)`,
    );
  }
  let names: readonly string[];
  try {
    ({ names } = await probe('gpu-names', PROBE_TIMEOUT_MS));
  } catch (cause) {
    const error = PdError.from(cause);
    throw new PdError(
      error.code === 'CUDA_ERROR' ? 'DEVICE_UNAVAILABLE' : error.code,
      `--device cuda: no GPU can be used here: ${error.message}. Without one: --device host`,
      error.context,
      { cause },
    );
  }
  const wanted = prefill + decode;
  if (names.length >= wanted) return;
  const here = names.map((name, i) => `cuda:${i} ${name}`).join(', ') || 'none';
  const lacking = workerNames(settings)
    .slice(names.length)
    .map((name, i) => `cuda:${names.length + i} for ${name}`);
  const visible = process.env['CUDA_VISIBLE_DEVICES'];
  throw new PdError(
    'DEVICE_UNAVAILABLE',
    `--prefill ${prefill} --decode ${decode} --device cuda wants ${wanted} GPUs, one each, and this process sees ${names.length} (${here}${
      visible === undefined ? '' : `; CUDA_VISIBLE_DEVICES=${visible}`
    }): there is no ${lacking.join(', no ')}`,
  );
}

/** In the order in which GPUs are given: producers first. */
function workerNames({ prefill, decode }: GpuSettings): string[] {
  return Array.from({ length: prefill + decode }, (_, i) =>
    i < prefill ? `producer-${i}` : `consumer-${i - prefill}`,
  );
}
