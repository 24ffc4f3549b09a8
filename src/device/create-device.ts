import { PdError } from '../errors.ts';
import type { Device } from './device.ts';
import { HostDevice } from './host.ts';

/** `host`, or `cuda:N`. Throws CONFIG_INVALID for another name and DEVICE_UNAVAILABLE where there is no such GPU. */
export async function createDevice(name: string): Promise<Device> {
  if (name === 'host') return new HostDevice();
  const index = /^cuda:(\d{1,3})$/.exec(name)?.[1];
  if (index === undefined) {
    throw new PdError('CONFIG_INVALID', `device ${JSON.stringify(name)} is neither host nor cuda:N`);
  }
  // Loaded only where a GPU is asked for, so that a machine without one needs none of its libraries.
  const { createCudaDevice } = await import('./cuda.ts').catch((cause: unknown) => {
    if (cause instanceof PdError) throw cause;
    throw PdError.because('DEVICE_UNAVAILABLE', `device ${name}: the CUDA part could not be loaded`, cause);
  });
  return createCudaDevice(Number(index));
}
