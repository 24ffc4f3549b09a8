/** Entry of a throwaway thread that takes page-locked memory: the call blocks its thread for about 0.5 ms per MiB. */
import { parentPort, workerData } from 'node:worker_threads';
import { setNativeDefaults } from '../../../ffi/libc.ts';
import { loadCudart } from '../../../ffi/libcudart.ts';
import { PdError } from '../../errors.ts';
import { CUDA_ENVIRONMENT } from '../native-env.ts';
import type { PinnedAnswer, PinnedJob } from './pinned.ts';

const job = workerData as PinnedJob;
let answer: PinnedAnswer;
try {
  setNativeDefaults(CUDA_ENVIRONMENT);
  const runtime = loadCudart();
  runtime.setDevice(job.device);
  answer = { ok: true, pointer: runtime.hostAlloc(job.bytes, job.what) };
} catch (error) {
  answer = { ok: false, error: PdError.from(error, 'CUDA_ERROR').toData() };
}
parentPort?.postMessage(answer);
