/** A real core thread (built JavaScript) on the host device with the demo model, as the main thread sees it. */

import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { demoModelDir } from '../../src/config/demo-model.ts';
import { type WorkerConfigInput, workerConfig } from '../../src/config/embedded.ts';
import type { WorkerConfig } from '../../src/config/worker-config.ts';
import { GREEDY } from '../../src/model/sampler.ts';
import { MetricsPage } from '../../src/observability/metrics.ts';
import type { CoreRequest, RequestOutput, SamplingParams } from '../../src/scheduler/types.ts';
import type { EngineRequestId } from '../../src/wire/ids.ts';
import type { CoreInfo, CoreState, FromCore, ToCore } from '../../src/worker/core-messages.ts';
import { transferOf } from '../../support/ids.ts';
import { PATIENT_TIMEOUTS } from './transfer.ts';

const ENTRY = fileURLToPath(new URL('../../dist/src/worker/core-thread.js', import.meta.url));

function coreConfig({ modelDir = demoModelDir(), ...changes }: WorkerConfigInput = {}): WorkerConfig {
  const config = workerConfig({
    kvBufferSize: 64 * 2 ** 20,
    memPoolSize: 64 * 2 ** 20,
    loadFailure: 'fail',
    maxNumSeqs: 8,
    maxNumBatchedTokens: 32,
    numBlocks: 128,
    timeouts: PATIENT_TIMEOUTS,
    drainTimeoutMs: 1_000,
    log: { level: 'warn', format: 'json' },
    ...changes,
  });
  // The core itself is to say what is wrong with a directory.
  return { ...config, modelDir };
}

export class CoreHarness {
  readonly pages = { core: new MetricsPage(), transfer: new MetricsPage() };
  readonly outputs: RequestOutput[] = [];
  readonly #worker: Worker;
  readonly #listeners = new Set<(message: FromCore) => void>();

  private constructor(config: WorkerConfig) {
    const metrics = { core: this.pages.core.buffer, transfer: this.pages.transfer.buffer };
    this.#worker = new Worker(ENTRY, { workerData: { config, metrics }, name: 'core' });
    this.#worker.setMaxListeners(0);
    this.#worker.on('message', (message: FromCore) => {
      if (message.type === 'outputs') this.outputs.push(...message.outputs);
      for (const listener of [...this.#listeners]) listener(message);
    });
  }

  /** Rejects with the message of a fatal error. */
  static async start(changes: WorkerConfigInput = {}): Promise<{ core: CoreHarness; info: CoreInfo }> {
    const core = new CoreHarness(coreConfig(changes));
    const first = await core.next((message) =>
      message.type === 'ready' || message.type === 'fatal' ? message : undefined,
    );
    if (first.type === 'fatal') throw new Error(`${first.error.code}: ${first.error.message}`);
    return { core, info: first.info };
  }

  post(message: ToCore): void {
    this.#worker.postMessage(message);
  }

  /** The first message from now on that `pick` answers to; rejects when the thread ends before. */
  next<T>(pick: (message: FromCore) => T | undefined): Promise<T> {
    return new Promise((resolve, reject) => {
      const onExit = () => reject(new Error('the core thread has ended'));
      const listener = (message: FromCore) => {
        const picked = pick(message);
        if (picked === undefined) return;
        this.#listeners.delete(listener);
        this.#worker.off('exit', onExit);
        resolve(picked);
      };
      this.#listeners.add(listener);
      this.#worker.once('exit', onExit);
    });
  }

  /** Outputs of a request, until all its completions have ended. */
  async generate(request: CoreRequest): Promise<RequestOutput[]> {
    const mine = () => this.outputs.filter(({ requestId }) => requestId === request.requestId);
    const ended = this.next(() =>
      mine().filter(({ finishReason }) => finishReason).length === request.n ? mine() : undefined,
    );
    this.post({ type: 'add', request });
    return ended;
  }

  async state(): Promise<CoreState> {
    const answered = this.next((message) => (message.type === 'state' ? message.state : undefined));
    this.post({ type: 'state', seq: 1, integrity: true });
    return answered;
  }

  /** Resolves with the thread's exit code. */
  async shutdown(): Promise<number> {
    const exit = once(this.#worker, 'exit');
    this.post({ type: 'shutdown' });
    const [code] = await exit;
    return code as number;
  }
}

export function greedy(
  requestId: EngineRequestId,
  promptTokens: readonly number[],
  more: Partial<SamplingParams> & { readonly n?: number } = {},
): CoreRequest {
  const { n = 1, ...sampling } = more;
  return {
    requestId,
    transferId: transferOf(requestId),
    promptTokens: Int32Array.from(promptTokens),
    sampling: { ...GREEDY, ...sampling },
    n,
  };
}

export function textOf(outputs: readonly RequestOutput[], index = 0): number[] {
  return outputs.filter((output) => output.index === index).flatMap(({ tokens }) => [...tokens]);
}
