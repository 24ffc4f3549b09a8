/** Which device each worker of pd-launch gets: one choice for all, made before anything starts. */
import { chooseDevices, type DeviceChoice, namedDevice } from '../config/device-choice.ts';
import { PdError } from '../errors.ts';
import { gpuFacts, neededLibraries } from './gpu-facts.ts';
import type { LaunchSettings } from './launch-plan.ts';

type DeviceSettings = Pick<LaunchSettings, 'device' | 'executor' | 'prefill' | 'decode'>;

/** Throws what `chooseDevices` throws; CONFIG_INVALID for `cuda:N`, one GPU for all. */
export async function launchDevices(
  settings: DeviceSettings,
  env: NodeJS.ProcessEnv = process.env,
): Promise<DeviceChoice> {
  const { device, executor } = settings;
  const workers = workerNames(settings);
  if (device === 'host') return namedDevice(device, workers.length);
  if (device !== 'auto' && device !== 'cuda') {
    throw new PdError(
      'CONFIG_INVALID',
      `--device ${device} puts producer and consumer on one GPU, where NCCL refuses to join them: --device cuda gives each its own (CUDA_VISIBLE_DEVICES chooses which)`,
    );
  }
  const libraries = neededLibraries('producer', executor);
  const facts = await gpuFacts({ insist: device === 'cuda', libraries, env });
  return chooseDevices({ device, workers, ...(executor && { executor }) }, facts);
}

/** In the order in which GPUs are given: producers first. */
export function workerNames({ prefill, decode }: Pick<LaunchSettings, 'prefill' | 'decode'>): string[] {
  return Array.from({ length: prefill + decode }, (_, i) =>
    i < prefill ? `producer-${i}` : `consumer-${i - prefill}`,
  );
}
