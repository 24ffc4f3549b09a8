/** pd-worker: options, signals, exit. */
import { Command } from 'commander';
import { addOptions } from '../config/options.ts';
import { resolveHosts } from '../config/resolve-hosts.ts';
import { resolveWorkerConfig } from '../config/resolve-worker.ts';
import type { WorkerConfig } from '../config/worker-config.ts';
import { WORKER_OPTIONS } from '../config/worker-options.ts';
import { PdError } from '../errors.ts';
import { demoModelDir } from '../model/demo.ts';
import { createLogger } from '../observability/log.ts';
import { packageVersion } from '../version.ts';
import { PdWorker } from '../worker/worker.ts';
import { startErrorLine } from './run.ts';

const EXAMPLES = `
Examples:
  pd-worker                         the demo model, undivided, on port 8080
  pd-worker --role producer --proxy 127.0.0.1:30002 --kv-port 8082
  pd-worker --role consumer --proxy 127.0.0.1:30002 --kv-port 8084
  pd-worker --model /models/llama --device cuda:0 \\
            --kv-transfer-config '{"kv_connector":"P2pNcclConnector",...}'
`;

export function workerCommand(): Command {
  const command = new Command('pd-worker')
    .description(
      "Serves a model over OpenAI's API: whole, or its prefill or decode half, KV moving from GPU to GPU.",
    )
    .version(packageVersion())
    .allowExcessArguments(false)
    .showHelpAfterError('(--help lists the options)');
  return addOptions(command, WORKER_OPTIONS).addHelpText('after', EXAMPLES);
}

/** A start that was told to stop has so long to end and to be taken apart in order. */
const EARLY_STOP_MS = 2_000;

/** From having nothing left to serve, or being told to end at once, to being gone. */
const EXIT_SECONDS = 4;

/**
 * On a GPU a thread may sit in a native call that never returns (an abort behind a long kernel, a broken driver), and then neither
 * `terminate()` nor `process.exit()` ends the process: the kernel does, by SIGALRM, so many seconds after the last call.
 */
async function lastResort(config: WorkerConfig): Promise<(seconds: number) => void> {
  if (config.device === 'host') return () => undefined;
  const { killAfter } = await import('../../ffi/libc.ts');
  return (seconds) => killAfter(Math.ceil(seconds));
}

/** Without a word to the other threads: whoever calls this has given up waiting for them. */
async function endNow(): Promise<void> {
  try {
    const { exitNow } = await import('../../ffi/libc.ts');
    exitNow(0);
  } finally {
    process.exit(0);
  }
}

/** Undefined where `stop` came first. */
async function startUnless(stop: AbortSignal, config: WorkerConfig): Promise<PdWorker | undefined> {
  try {
    return await PdWorker.start(config, undefined, stop);
  } catch (error) {
    if (stop.aborted && error === stop.reason) return undefined;
    throw error;
  }
}

/** Runs until SIGTERM or SIGINT; a second signal ends at once. Exit status 1 where the worker could not start or go on. */
export async function main(argv: readonly string[] = process.argv.slice(2)): Promise<void> {
  const command = workerCommand().parse(argv, { from: 'user' });
  const { config: given, warnings } = resolveWorkerConfig(command, {
    env: process.env,
    demoModelDir,
  });
  const log = createLogger(given.log, 'main');
  for (const warning of warnings) log.warn(warning);
  const { config, lines } = await resolveHosts(given);
  for (const line of lines) log.info(line);

  let signals = 0;
  const stopped = new AbortController();
  const whileStarting = (signal: NodeJS.Signals) => {
    if (signals > 1) return void endNow();
    log.info(`${signal}: giving up the start, within ${EARLY_STOP_MS / 1_000} s; once more: at once`);
    setTimeout(() => void endNow(), EARLY_STOP_MS);
    stopped.abort(new PdError('SERVER_DRAINING', `${signal} came while the worker started`));
  };
  // One listener for good: a signal that arrives while a listener is taken off and another put on is lost.
  let onSignal = whileStarting;
  const heard = (signal: NodeJS.Signals) => {
    signals++;
    onSignal(signal);
  };
  process.on('SIGTERM', heard).on('SIGINT', heard);

  const worker = await startUnless(stopped.signal, config);
  const endWithin = await lastResort(config);
  if (!worker || stopped.signal.aborted) {
    await worker?.close(0);
    return process.exit(0);
  }
  onSignal = (signal) => {
    if (signals === 1) log.info(`${signal}: draining, at most ${config.drainTimeoutMs / 1_000} s`);
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
