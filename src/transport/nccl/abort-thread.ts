/** Entry of a throwaway thread that ends one communicator. The call blocks on the whole device, for as long as its longest kernel. */
import { parentPort, workerData } from 'node:worker_threads';
import { loadCudart } from '../../../ffi/libcudart.ts';
import { loadLibnccl } from '../../../ffi/libnccl.ts';
import { PdError } from '../../errors.ts';
import type { AbortAnswer, AbortJob } from './abort.ts';

const job = workerData as AbortJob;
let answer: AbortAnswer;
try {
  loadCudart().setDevice(job.device);
  loadLibnccl().abort(job.comm);
  answer = { ok: true };
} catch (error) {
  answer = { ok: false, error: PdError.from(error, 'NCCL_ERROR').toData() };
}
parentPort?.postMessage(answer);
