/** The device `cuda:N`. Imported only where a GPU is asked for: it loads NVIDIA's libraries. */
import { setNativeDefaults } from '../../ffi/libc.ts';
import { PdError } from '../errors.ts';
import { CudaDevice } from './cuda/device.ts';
import { CUDA_ENVIRONMENT } from './native-env.ts';

/** Throws LIBRARY_NOT_FOUND, LIBRARY_TOO_OLD, DEVICE_UNAVAILABLE (no driver, no such GPU) or CUDA_ERROR. */
export async function createCudaDevice(index: number): Promise<CudaDevice> {
  setNativeDefaults(CUDA_ENVIRONMENT);
  try {
    return CudaDevice.create(index);
  } catch (cause) {
    const error = PdError.from(cause, 'CUDA_ERROR');
    // no usable driver or GPU behind the library: to the user that is "no device", not a failed call
    if (error.code !== 'CUDA_ERROR' || !isAbsent(error.context['call'])) throw error;
    throw new PdError('DEVICE_UNAVAILABLE', `cuda:${index}: ${error.message}`, error.context, { cause });
  }
}

function isAbsent(call: unknown): boolean {
  return call === 'cuInit' || call === 'cudaGetDeviceCount' || call === 'cudaSetDevice';
}
