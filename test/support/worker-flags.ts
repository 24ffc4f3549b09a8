/** A worker as `pd-worker` would resolve it from flags and an environment. */
import { Command } from 'commander';
import { addOptions } from '../../src/config/options.ts';
import {
  type ResolvedWorker,
  readWorkerOptions,
  resolveGivenWorker,
  type WorkerEnvironment,
} from '../../src/config/resolve-worker.ts';
import { WORKER_OPTIONS } from '../../src/config/worker-options.ts';

export function resolveFlags(args: readonly string[], outside: WorkerEnvironment): ResolvedWorker {
  const command = addOptions(new Command('pd-worker').exitOverride(), WORKER_OPTIONS);
  return resolveGivenWorker(readWorkerOptions(command.parse(args, { from: 'user' }), outside.env), outside);
}
