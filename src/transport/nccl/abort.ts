/** Ending communicators off the transfer thread. Each abort has a thread of its own: one can return only after another has begun. */
import { Worker } from 'node:worker_threads';
import type { NcclCommHandle } from '../../../ffi/pointers.ts';
import { type ErrorData, PdError } from '../../errors.ts';
import { threadEntry } from '../../thread-entry.ts';

export interface AbortJob {
  readonly device: number;
  readonly comm: NcclCommHandle;
}

export type AbortAnswer = { readonly ok: true } | { readonly ok: false; readonly error: ErrorData };

const underWay = new Set<Promise<unknown>>();

/** Aborts of this thread that have not returned. At the end of a process they hold it up: see `killAfter` in ffi/libc.ts. */
export function abortsUnderWay(): number {
  return underWay.size;
}

/** Resolves when those that are under way now have returned, which may be never. */
export async function abortsReturned(): Promise<void> {
  await Promise.all(underWay);
}

/**
 * Resolves when the abort has returned, with the error where it failed. That may take as long as the longest kernel on the GPU, or
 * forever: nobody may wait for it without a deadline. It does not keep the process alive, but `process.exit` cannot cut it short either
 * (`killAfter` in ffi/libc.ts can).
 */
export function abortOnThread(job: AbortJob): Promise<PdError | undefined> {
  const done = run(job);
  underWay.add(done);
  void done.then(() => underWay.delete(done));
  return done;
}

function run(job: AbortJob): Promise<PdError | undefined> {
  return new Promise((resolve) => {
    let worker: Worker;
    try {
      worker = new Worker(threadEntry(import.meta.url, './abort-thread.js'), {
        workerData: job,
        name: 'pd-abort',
      });
    } catch (error) {
      resolve(PdError.from(error, 'NCCL_ERROR'));
      return;
    }
    worker.unref();
    worker.on('message', (answer: AbortAnswer) => {
      resolve(answer.ok ? undefined : PdError.fromData(answer.error));
    });
    worker.on('error', (error) => resolve(PdError.from(error, 'NCCL_ERROR')));
    worker.on('exit', (code) => resolve(new PdError('NCCL_ERROR', `the abort's thread ended with ${code}`)));
  });
}
