/** Waiting for the transfer thread to be ready. */
import type { Worker } from 'node:worker_threads';
import { PdError } from '../errors.ts';
import type { HostPort } from '../net/address.ts';
import type { FromTransfer } from './thread-messages.ts';

/** The address, once the thread is ready; what it says instead where it cannot be. */
export function started(worker: Worker): Promise<HostPort> {
  return new Promise((resolve, reject) => {
    const end = () => {
      worker.off('message', onMessage);
      worker.off('error', onError);
      worker.off('exit', onExit);
    };
    const onMessage = ([message]: readonly FromTransfer[]) => {
      end();
      if (!message) return reject(new PdError('INTERNAL', 'the transfer thread began with nothing'));
      if (message.type === 'ready') resolve(message.address);
      else if (message.type === 'not-ready') reject(PdError.fromData(message.error));
      else reject(new PdError('INTERNAL', `the transfer thread began with ${message.type}`));
    };
    const onError = (error: unknown) => {
      end();
      reject(PdError.from(error));
    };
    const onExit = (code: number) => {
      end();
      reject(new PdError('INTERNAL', `the transfer thread ended at its start with code ${code}`));
    };
    worker.on('message', onMessage).on('error', onError).on('exit', onExit);
  });
}
