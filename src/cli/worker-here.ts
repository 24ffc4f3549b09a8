/** The worker that flags and environment mean on this machine: `--device auto` is decided by the GPUs that it has. */

import { demoModelDir } from '../config/demo-model.ts';
import { chooseDevices, type DeviceChoice, namedDevice } from '../config/device-choice.ts';
import {
  type GivenWorker,
  type ResolvedWorker,
  resolveGivenWorker,
  type WorkerEnvironment,
} from '../config/resolve-worker.ts';
import { gpuFacts, neededLibraries } from './gpu-facts.ts';

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
