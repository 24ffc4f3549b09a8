/**
 * The core's loop. One turn: take what has arrived, schedule, run, update, collect.
 *
 *   add, abort --+                      +--> executor.forward --(after each layer)--> connector.saveKvLayer
 *                +--> schedule() step --+                                                  |
 *   load ended --+                      +--> connector.startLoadKv        waitForSave <----+ --> promptsDrawn --> update --> post
 *
 * Outputs of a step are posted after `waitForSave`: a producer answers only once its KV is sent, or kept where the consumer finds it.
 * Between turns the event loop runs once, so that messages and aborts are received; with nothing to do it sleeps. The end of a load is
 * handled during a step too: a first token that came with its KV is posted at once.
 */
import { setImmediate } from 'node:timers/promises';
import type { LoadFailurePolicy } from '../config/worker-config.ts';
import type { LoadOutcome, SaveOutcome, WorkerConnector } from '../connector/connector.ts';
import { type Deferred, deferred } from '../deferred.ts';
import { type ErrorData, PdError } from '../errors.ts';
import { blockBytes } from '../kv/layout.ts';
import type { Executor, LayerHooks } from '../model/executor.ts';
import type { Logger } from '../observability/log.ts';
import type { MetricsPage } from '../observability/metrics.ts';
import { type Timeline, Timelines } from '../observability/timelines.ts';
import type { Scheduler } from '../scheduler/scheduler.ts';
import { firstTokens, type SchedulerStep } from '../scheduler/step.ts';
import type { CacheChange, CoreRequest, ForwardResult, RequestOutput } from '../scheduler/types.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';
import type { WorkerLoad } from '../wire/messages.ts';
import type { CoreGrammars } from './core-grammars.ts';
import type { CoreStage, CoreState } from './core-messages.ts';
import { CoreMetrics } from './core-metrics.ts';
import { CoreStages } from './core-stages.ts';
import { LoadReport } from './load-report.ts';
import { ThroughputLog, type ThroughputLogOptions } from './throughput-log.ts';

/** After this many failed steps in a row the executor counts as broken. */
const MAX_FAILED_STEPS = 3;

export interface CoreLoopOptions {
  readonly executor: Executor;
  readonly scheduler: Scheduler;
  /** Absent in an undivided worker. */
  readonly connector?: WorkerConnector;
  /** Absent: no request has one. */
  readonly grammars?: CoreGrammars;
  readonly loadFailure: LoadFailurePolicy;
  readonly metrics: MetricsPage;
  /** The hand-over stamps the same. Absent: the loop keeps its own. */
  readonly timelines?: Timelines<CoreStage>;
  /** By which KV travels on pairs. */
  readonly pairs?: 'host' | 'nccl';
  readonly log: Logger;
  readonly post: (outputs: readonly RequestOutput[]) => void;
  /** KV of a request whose output said that it was `opening`: under way now, or lost. */
  readonly kvSaved?: (requestId: EngineRequestId, error: ErrorData | undefined) => void;
  /** Receives the load as it changes. */
  readonly reportLoad?: (load: WorkerLoad) => void;
  /** Receives them once a turn, if the scheduler keeps them. */
  readonly cacheChanged?: (changes: readonly CacheChange[]) => void;
  /** For tests: what the lines of throughput are timed by. */
  readonly clock?: ThroughputLogOptions['clock'];
}

export class CoreLoop {
  readonly #options: CoreLoopOptions;
  readonly #scheduler: Scheduler;
  readonly #connector: WorkerConnector | undefined;
  readonly #log: Logger;
  readonly #metrics: CoreMetrics;
  readonly #throughput: ThroughputLog;
  readonly #load: LoadReport | undefined;
  readonly #saving: LayerHooks;
  readonly #stages: CoreStages;
  /** What has come since the last turn. */
  readonly #commands: (() => void)[] = [];
  /** Set while the loop sleeps. */
  #sleep: Deferred<void> | undefined;
  #watchedLoads: Promise<void> | undefined;
  /** Why the core cannot go on: its next turn says so. */
  #lost: PdError | undefined;
  /** Loads have ended, or blocks were given back, since the turn began. */
  #heard = false;
  #failedSteps = 0;
  #closing = false;

  constructor(options: CoreLoopOptions) {
    this.#options = options;
    this.#scheduler = options.scheduler;
    this.#connector = options.connector;
    const { timelines = new Timelines<CoreStage>(), pairs = 'host', executor } = options;
    const ofBlock = executor.layers.reduce((sum, { cache }) => sum + blockBytes(cache.layout), 0);
    this.#stages = new CoreStages(timelines, ofBlock, pairs);
    this.#log = options.log;
    this.#metrics = new CoreMetrics(options.metrics);
    const { scheduler, metrics: page, log, clock } = options;
    this.#throughput = new ThroughputLog({ scheduler, page, log, ...(clock && { clock }) });
    const { reportLoad } = options;
    this.#load = reportLoad && new LoadReport(() => loadOf(scheduler), reportLoad);
    this.#saving = saveHooks(options.executor, options.connector);
  }

  add(request: CoreRequest): void {
    this.#stages.received(request);
    this.#hear(() => this.#add(request));
  }

  /** One completion, or all of the request. */
  abort(requestId: EngineRequestId, index?: number): void {
    this.#hear(() => this.#abort(requestId, index));
  }

  /** The producer is done with the prompt; it matters to a request whose load has not begun. */
  prefilled(transferId: TransferId): void {
    this.#hear(() => this.#scheduler.prefilled(transferId));
  }

  /** Nobody will come for its KV, and the step under way may end it: at once for what is known, in its turn for what has just come. */
  released(transferId: TransferId): void {
    this.#scheduler.released(transferId);
    this.#hear(() => this.#scheduler.released(transferId));
  }

  /** Ends the loop after the step under way; `run` resolves then, and every request left has ended with SERVER_DRAINING. Idempotent. */
  close(): void {
    this.#closing = true;
    this.#sleep?.resolve();
  }

  /** Some request is computed, loads or waits. */
  get isBusy(): boolean {
    return this.#scheduler.numRequests > 0 || this.#commands.length > 0;
  }

  /** Of those of these requests that are known. */
  timelines(transferIds: readonly TransferId[]): readonly Timeline<CoreStage>[] {
    return this.#stages.of(transferIds);
  }

  /** `integrity`: with a look through every block. */
  state(integrity = true): CoreState {
    const { numRunning, numWaiting, numLoading, blocks } = this.#scheduler;
    return {
      running: numRunning,
      waiting: numWaiting,
      loading: numLoading,
      blocks,
      ...(integrity && {
        integrity: this.#scheduler.checkIntegrity(),
        recentRequests: this.#stages.recent(),
      }),
    };
  }

  /** What this worker has to do, now. */
  get load(): WorkerLoad {
    return loadOf(this.#scheduler);
  }

  /** Serves until `close`. Rejects where the core cannot go on; every request has then ended with that error. */
  async run(): Promise<void> {
    let reason = new PdError('SERVER_DRAINING', 'the worker stopped before the request was done');
    try {
      while (!this.#closing) await this.#turn();
    } catch (error) {
      reason = PdError.from(error);
      throw reason;
    } finally {
      // What the last messages brought has not been started; it ends like the rest.
      this.#takeCommands();
      this.#emit(this.#scheduler.endAll(reason.toData()));
      this.#metrics.scheduler(this.#scheduler);
      this.#throughput.close();
      this.#load?.close();
    }
  }

  async #turn(): Promise<void> {
    this.#heard = false;
    this.#takeCommands();
    this.#takeLoads();
    if (this.#lost) throw this.#lost;
    // Before their blocks can be others': what was to be written from them must not be.
    this.#tellFinished();
    if (this.#scheduler.numRequests > 0) this.#throughput.working();
    const step = this.#scheduler.schedule();
    if (step.metadata) {
      this.#stages.moving(step.metadata);
      this.#connector?.startLoadKv(step.metadata);
    }
    if (step.entries.length > 0) await this.#run(step);
    this.#tellFinished();
    this.#metrics.scheduler(this.#scheduler);
    this.#load?.changed();
    const changes = this.#scheduler.takeCacheChanges();
    if (changes.length > 0) this.#options.cacheChanged?.(changes);
    const { missingBlocks } = this.#scheduler;
    const room = missingBlocks > 0 ? this.#connector?.makeRoom(missingBlocks) : undefined;
    if (step.entries.length > 0 || step.preempted.length > 0 || room === true) await setImmediate();
    else await this.#rest(room);
  }

  async #run(step: SchedulerStep): Promise<void> {
    const unfinished = step.entries.filter(({ sequence }) => sequence.numOutput === 0);
    this.#stages.stepped(unfinished, 'step');
    const result = await this.#forward(step);
    this.#metrics.step(step.numTokens);
    this.#stages.stepped(
      unfinished.filter(({ sampled }) => sampled),
      'drawn',
    );
    // Also after a failure: what was saved is still being gathered from the step's blocks.
    const unsaved = (await this.#connector?.waitForSave()) ?? [];
    if (step.metadata) this.#stages.saved(step.metadata.saves);
    if (result instanceof PdError) this.#fail(step, result);
    else {
      if (step.metadata && step.metadata.fills.length > 0)
        this.#connector?.promptsDrawn(firstTokens(step, result));
      this.#update(step, result, unsaved);
    }
    for (const outcome of unsaved) {
      if (outcome.state === 'failed') this.#needEngine(outcome.error);
      else void outcome.settled.then((error) => this.#options.kvSaved?.(outcome.requestId, error));
    }
  }

  #update(step: SchedulerStep, result: ForwardResult, unsaved: readonly SaveOutcome[]): void {
    try {
      this.#emit(withSaves(this.#scheduler.update(step, result), unsaved));
      this.#failedSteps = 0;
    } catch (error) {
      this.#fail(step, PdError.from(error));
    }
  }

  /** Without its transfer engine this instance is no longer half of a pair; it would only look like one. */
  #needEngine(error: ErrorData): void {
    if (error.code === 'ENGINE_CLOSED' && !this.#closing) this.#lost ??= PdError.fromData(error);
  }

  async #forward(step: SchedulerStep): Promise<ForwardResult | PdError> {
    try {
      // A mark per layer, which costs a GPU an event each, only where a save waits for it.
      const { saves, fills } = step.metadata ?? { saves: [], fills: [] };
      const marked = saves.length + fills.length > 0;
      return await this.#options.executor.forward(step.batch, {
        ...(marked && this.#saving),
        mask: (sequence) => this.#options.grammars?.mask(sequence),
      });
    } catch (error) {
      return PdError.from(error);
    }
  }

  #fail(step: SchedulerStep, error: PdError): void {
    this.#failedSteps++;
    const requests = step.batch.sequences.map(({ requestId }) => requestId);
    this.#log.error(
      { requests, code: error.code, err: error.cause ?? error },
      `a step of ${step.numTokens} tokens failed, its ${requests.length} sequences end: ${error.message}`,
    );
    this.#emit(this.#scheduler.failStep(step, error.toData()));
    if (this.#failedSteps < MAX_FAILED_STEPS) return;
    const message = `${MAX_FAILED_STEPS} steps in a row failed, the last: ${error.message}`;
    throw new PdError(error.code, message, error.context, { cause: error });
  }

  #hear(command: () => void): void {
    this.#commands.push(command);
    this.#sleep?.resolve();
  }

  #takeCommands(): void {
    for (const command of this.#commands.splice(0)) command();
  }

  #add(request: CoreRequest): void {
    try {
      this.#scheduler.add(request);
    } catch (error) {
      const { requestId, n } = request;
      const told = PdError.from(error).toData();
      const refused = { requestId, tokens: [], finishReason: 'error', error: told } as const;
      this.#emit(Array.from({ length: Math.max(1, n) }, (_, index) => ({ ...refused, index })));
    }
  }

  #abort(requestId: EngineRequestId, index: number | undefined): void {
    const outputs = this.#scheduler.abort(requestId, index);
    // A single completion is given up at a stop string, a whole request when its client goes away.
    for (const _ of outputs) this.#metrics.finished(index === undefined ? 'abort' : 'stop');
    if (outputs.length > 0) this.#post(outputs);
  }

  /** Also while a step is under way. */
  #takeLoads(): void {
    const { loadFailure } = this.#options;
    for (const told of this.#connector?.getFinished() ?? []) {
      const outcome = this.#withUsableDraw(told);
      const { requestId } = outcome;
      this.#metrics.load(outcome, loadFailure);
      this.#stages.loaded(outcome);
      if (outcome.ok) {
        const { bytes, milliseconds } = outcome;
        this.#log.debug({ requestId, bytes, milliseconds }, 'load done');
      } else if (outcome.error.code === 'REQUEST_ABORTED') {
        this.#log.debug({ requestId }, 'load given up');
      } else {
        const then = loadFailure === 'fail' ? 'the request fails' : 'the prompt is computed here';
        const { code, message } = outcome.error;
        this.#log.warn({ requestId, code }, `KV of request ${requestId} did not come, ${then}: ${message}`);
      }
      this.#emit(this.#scheduler.loadEnded(outcome, loadFailure));
      if (!outcome.ok) this.#needEngine(outcome.error);
    }
    this.#watchLoads();
  }

  /** Without a first token that cannot be what would have been drawn here. */
  #withUsableDraw(outcome: LoadOutcome): LoadOutcome {
    if (!outcome.ok || !outcome.draw) return outcome;
    const { draw, ...rest } = outcome;
    const { vocabSize } = this.#options.executor;
    const grammar = this.#scheduler.samplingOf(outcome.requestId)?.grammar;
    const alternatives = (draw.logprobs ?? []).flatMap(({ token, top }) => [
      token,
      ...top.map((one) => one.token),
    ]);
    // They index tables here.
    const known = [...draw.tokens, ...alternatives].every((token) => token < vocabSize);
    const allowed =
      !grammar || draw.tokens.every((token) => this.#options.grammars?.mayBegin(grammar, token) === true);
    return known && allowed ? outcome : rest;
  }

  #emit(outputs: readonly RequestOutput[]): void {
    if (outputs.length === 0) return;
    this.#metrics.outputs(outputs);
    this.#post(outputs);
  }

  #post(outputs: readonly RequestOutput[]): void {
    this.#stages.posted(outputs);
    this.#options.post(outputs);
  }

  #tellFinished(): void {
    for (const finished of this.#scheduler.takeFinished()) this.#connector?.requestFinished(finished);
  }

  /** Sleeps until a message comes, a load ends or blocks are given back; at most `ms`, after which blocks may be available. */
  async #rest(ms: number | undefined): Promise<void> {
    if (this.#commands.length > 0 || this.#heard || this.#closing || this.#lost) return;
    const { numRunning, numWaiting, numLoading, blockManager } = this.#scheduler;
    if (numRunning + numWaiting > 0 && numLoading === 0 && !blockManager.isShared) {
      const stuck = `nothing can run, with ${numRunning} running and ${numWaiting} waiting requests`;
      throw new PdError('INTERNAL', stuck);
    }
    this.#sleep = deferred<void>();
    const timer = ms === undefined ? undefined : setTimeout(this.#sleep.resolve, ms);
    await this.#sleep.promise;
    clearTimeout(timer);
    this.#sleep = undefined;
  }

  /** One reaction per promise: racing the same one every turn would pile them up. */
  #watchLoads(): void {
    const promise = this.#connector?.loadEnded;
    if (!promise || promise === this.#watchedLoads) return;
    this.#watchedLoads = promise;
    const hear = () => {
      this.#takeLoads();
      this.#heard = true;
    };
    void promise
      .then(hear)
      .catch((error: unknown) => {
        this.#lost ??= PdError.from(error);
      })
      .then(() => this.#sleep?.resolve());
  }
}

function loadOf({ numRunning, numWaiting, numLoading, blocks, queuedTokens }: Scheduler): WorkerLoad {
  return {
    running: numRunning,
    waiting: numWaiting + numLoading,
    kvUsed: blocks.used,
    kvBlocks: blocks.total,
    queuedTokens,
  };
}

/** Whoever asked for a prompt learns with its token that the KV is not on its way. */
function withSaves(
  outputs: readonly RequestOutput[],
  unsaved: readonly SaveOutcome[],
): readonly RequestOutput[] {
  if (unsaved.length === 0) return outputs;
  return outputs.map((output) => {
    const outcome = unsaved.find(({ requestId }) => requestId === output.requestId);
    if (!outcome) return output;
    const { state } = outcome;
    return { ...output, kvSave: state === 'failed' ? { state, error: outcome.error } : { state } };
  });
}

function saveHooks(executor: Executor, connector: WorkerConnector | undefined): LayerHooks {
  if (!connector) return {};
  return {
    afterLayer: (index, ready) => {
      const layer = executor.layers[index];
      if (!layer)
        throw new PdError('INTERNAL', `the executor finished layer ${index} of ${executor.layers.length}`);
      connector.saveKvLayer(layer.name, layer.cache, ready);
    },
  };
}
