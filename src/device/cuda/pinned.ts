/** Page-locked host memory, allocated on a throwaway thread so that the thread that serves never stalls. */
import { Worker } from 'node:worker_threads';
import { type ErrorData, PdError } from '../../errors.ts';
import { threadEntry } from '../../thread-entry.ts';
import type { PinnedPointer } from '../device.ts';

export interface PinnedJob {
  readonly device: number;
  readonly bytes: number;
  readonly what: string;
}

export type PinnedAnswer =
  | { readonly ok: true; readonly pointer: PinnedPointer }
  | { readonly ok: false; readonly error: ErrorData };

/** Far more than the 0.7 s that 1 GiB takes; milliseconds. */
const DEADLINE = 60_000;

/**
 * Rejects with OUT_OF_DEVICE_MEMORY or CUDA_ERROR, at the latest after a minute. Memory that comes even later is handed to `late`,
 * which owns it then.
 */
export function allocatePinnedOnThread(
  job: PinnedJob,
  late: (pointer: PinnedPointer) => void,
): Promise<PinnedPointer> {
  return new Promise((resolve, reject) => {
    let settled = false;
    const worker = new Worker(threadEntry(import.meta.url, './pinned-thread.js'), {
      workerData: job,
      name: 'pd-pinned',
    });
    const fail = (error: PdError) => {
      settled = true;
      clearTimeout(timer);
      reject(error);
    };
    const timer = setTimeout(() => {
      worker.unref();
      fail(
        new PdError(
          'OUT_OF_DEVICE_MEMORY',
          `${job.what}: ${job.bytes} bytes of page-locked memory were not available within ${DEADLINE} ms`,
        ),
      );
    }, DEADLINE);
    worker.on('message', (answer: PinnedAnswer) => {
      if (answer.ok && settled) return late(answer.pointer);
      if (!answer.ok) return fail(PdError.fromData(answer.error));
      settled = true;
      clearTimeout(timer);
      resolve(answer.pointer);
    });
    worker.on('error', (error) => fail(PdError.from(error, 'CUDA_ERROR')));
    worker.on('exit', (code) => {
      if (!settled)
        fail(new PdError('CUDA_ERROR', `${job.what}: the thread that takes memory ended with ${code}`));
    });
  });
}
