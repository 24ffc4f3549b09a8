/** pd-worker: options, signals, exit. */
import { Command } from 'commander';
import { type DeviceChoice, withWayOut } from '../config/device-choice.ts';
import { resolveHosts } from '../config/hosts.ts';
import { addOptions } from '../config/options.ts';
import { readWorkerOptions } from '../config/resolve-worker.ts';
import type { WorkerConfig } from '../config/worker-config.ts';
import { WORKER_OPTIONS } from '../config/worker-options.ts';
import { PdError } from '../errors.ts';
import { createLogger } from '../observability/log.ts';
import { packageVersion } from '../version.ts';
import type { PdWorker } from '../worker/worker.ts';
import { resolveWorkerHere } from './device-auto.ts';
import { startErrorLine } from './run.ts';

const EXAMPLES = `
Examples:
  pd-worker                         the demo model, prefill and decode in one, on port 8080, on a GPU if there is one
  pd-worker --role producer --proxy 127.0.0.1:30002 --kv-port 8082
  pd-worker --role consumer --proxy 127.0.0.1:30002 --kv-port 8084
  CUDA_VISIBLE_DEVICES=0 pd-worker --model /models/llama \\
            --kv-transfer-config '{"kv_connector":"P2pNcclConnector",...}'
`;

export function workerCommand(): Command {
  const command = new Command('pd-worker')
    .description(
      "Serves a model over OpenAI's API: all of it, or prefill or decode only, with KV moving from GPU to GPU.",
    )
    .version(packageVersion())
    .allowExcessArguments(false)
    .showHelpAfterError('(--help lists the options)');
  return addOptions(command, WORKER_OPTIONS).addHelpText('after', EXAMPLES);
}

/** For an orderly exit when a signal arrives during startup. */
const EARLY_STOP_MS = 2_000;

/** For the process to exit once it has drained, or was told to exit at once. */
const EXIT_SECONDS = 4;

/**
 * On a GPU a thread may be stuck in a native call that never returns (an abort behind a long kernel, a broken driver), and then neither
 * `terminate()` nor `process.exit()` ends the process: the kernel does, by SIGALRM, that many seconds after the last call.
 */
async function lastResort(config: WorkerConfig): Promise<(seconds: number) => void> {
  if (config.transfer.device === 'host') return () => undefined;
  const { killAfter } = await import('../../ffi/libc.ts');
  return (seconds) => killAfter(Math.ceil(seconds));
}

/** Without notifying the other threads: the caller has given up waiting for them. */
async function endNow(): Promise<void> {
  try {
    const { exitNow } = await import('../../ffi/libc.ts');
    exitNow(0);
  } finally {
    process.exit(0);
  }
}

/** Undefined if `stop` came first. */
async function unlessStopped<T>(stop: AbortSignal, what: Promise<T>): Promise<T | undefined> {
  try {
    return await what;
  } catch (error) {
    if (stop.aborted && error === stop.reason) return undefined;
    throw error;
  }
}

/** If a GPU chosen by `auto` turns out to be unusable, the error says how to run without it. */
async function startOn(choice: DeviceChoice, config: WorkerConfig, stop: AbortSignal): Promise<PdWorker> {
  // Imported here: --help, a wrong flag and the choice of a device need no server.
  const { PdWorker } = await import('../worker/worker.ts');
  try {
    return await PdWorker.start(config, undefined, stop);
  } catch (error) {
    throw error === stop.reason ? error : withWayOut(PdError.from(error), choice);
  }
}

/** Runs until SIGTERM or SIGINT; a second signal exits at once. Exit status 1 if the worker could not start or keep running. */
export async function main(argv: readonly string[] = process.argv.slice(2)): Promise<void> {
  const command = workerCommand().parse(argv, { from: 'user' });
  const given = readWorkerOptions(command, process.env);
  const log = createLogger({ level: given.options.logLevel, format: given.options.logFormat }, 'main');

  let signals = 0;
  const stopped = new AbortController();
  const whileStarting = (signal: NodeJS.Signals) => {
    if (signals > 1) return void endNow();
    log.info(
      `${signal} during startup: exiting within ${EARLY_STOP_MS / 1_000} s; a second signal exits at once`,
    );
    setTimeout(() => void endNow(), EARLY_STOP_MS);
    stopped.abort(new PdError('SERVER_DRAINING', `${signal} while the worker was starting`));
  };
  // One listener throughout: a signal that arrives while listeners are exchanged is lost.
  let onSignal = whileStarting;
  const heard = (signal: NodeJS.Signals) => {
    signals++;
    onSignal(signal);
  };
  process.on('SIGTERM', heard).on('SIGINT', heard);

  if (given.options.device === 'auto') log.debug('choosing a device: which GPUs are visible?');
  const here = await unlessStopped(stopped.signal, resolveWorkerHere(given, process.env, stopped.signal));
  if (!here) return process.exit(0);
  for (const warning of here.warnings) log.warn(warning);
  log.info(here.choice.line);
  const { config, lines } = await resolveHosts(here.config);
  for (const line of lines) log.info(line);

  const worker = await unlessStopped(stopped.signal, startOn(here.choice, config, stopped.signal));
  const endWithin = await lastResort(config);
  if (!worker || stopped.signal.aborted) {
    await worker?.close(0);
    return process.exit(0);
  }
  onSignal = (signal) => {
    if (signals === 1) log.info(`${signal}: draining for at most ${config.drainTimeoutMs / 1_000} s`);
    else endWithin(EXIT_SECONDS);
    void worker.close(signals === 1 ? config.drainTimeoutMs : 0);
  };

  void worker.drained.then(() => endWithin(EXIT_SECONDS));
  const error = await worker.ended;
  endWithin(EXIT_SECONDS);
  if (error) console.error(startErrorLine('pd-worker', error));
  await worker.close(0);
  process.exit(error ? 1 : 0);
}
