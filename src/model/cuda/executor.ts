/**
 * Runs steps on a GPU. Everything is enqueued on one stream and the thread polls its end, so messages are handled while the GPU
 * computes. Memory is allocated when the executor is created; a step allocates none.
 */
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { CudaStream } from '../../device/cuda/stream.ts';
import type { DeviceEvent, DevicePointer, MemoryRef } from '../../device/device.ts';
import { int32View, sliceMemory } from '../../device/memory.ts';
import type { NamedLayer } from '../../device/paged-cache.ts';
import { EventPoller } from '../../device/poller.ts';
import type { ForwardBatch, ForwardResult, SampledToken, ScheduledSequence } from '../../scheduler/types.ts';
import type { TokenLogprob } from '../../wire/token-logprob.ts';
import type { Executor, LayerHooks, StepHooks } from '../executor.ts';
import { copyBlock } from '../kv-cache.ts';
import { StepMasks } from '../masks.ts';
import { lastRows, type SampledRow, sampledRows } from '../rows.ts';
import { isShaped } from '../shaping.ts';
import type { DecodeGraphs } from './graphs.ts';
import type { ModelKernels } from './kernels.ts';
import { type CudaLlama, word } from './llama.ts';
import { CudaSampler, type SamplerMemory } from './sampling.ts';
import {
  DRAW_WORDS,
  isDecodeStep,
  type PlanLimits,
  planStep,
  planWarmUp,
  type StepPlan,
} from './step-plan.ts';

/** One step; the longest prompts in one step take a few seconds. */
const STEP_TIMEOUT = 120_000;

/** Assembled by `create.ts`; the executor owns and disposes it. */
export interface CudaExecutorParts {
  readonly device: CudaDevice;
  readonly stream: CudaStream;
  readonly model: CudaLlama;
  readonly kernels: ModelKernels;
  readonly sampler: SamplerMemory;
  readonly layers: readonly NamedLayer[];
  readonly limits: PlanLimits;
  readonly batchInvariant: boolean;
  readonly logitRows: number;
  /** Page-locked and on the GPU: the step's plan. */
  readonly planHost: MemoryRef;
  readonly planDevice: MemoryRef & { readonly kind: 'cuda' };
  readonly graphs: DecodeGraphs;
  readonly dispose: () => void;
}

export class CudaExecutor implements Executor {
  readonly layers: readonly NamedLayer[];
  readonly vocabSize: number;
  readonly #parts: CudaExecutorParts;
  readonly #poller = new EventPoller();
  readonly #plan: Int32Array;
  readonly #sampler: CudaSampler;
  /** Events of the last step's layers. They may be recorded again once the connector has gathered what came before them. */
  #events: DeviceEvent[] = [];
  #disposed = false;

  constructor(parts: CudaExecutorParts) {
    this.#parts = parts;
    this.layers = parts.layers;
    this.vocabSize = parts.limits.vocab;
    this.#plan = int32View(parts.device.view(parts.planHost));
    this.#sampler = new CudaSampler(parts, (what) => this.#drained(what));
  }

  async forward(batch: ForwardBatch, hooks: StepHooks): Promise<ForwardResult> {
    return this.#settled(() => this.#forward(batch, hooks));
  }

  async #forward(batch: ForwardBatch, hooks: StepHooks): Promise<ForwardResult> {
    this.#begin(batch);
    const { sequences } = batch;
    const wanted = sampledRows(sequences);
    const masks = new StepMasks(sequences, hooks);
    const promptLogprobs = new Map<string, readonly TokenLogprob[]>();
    const size = this.#graphSize(sequences);
    if (size !== undefined) {
      this.#launchGraph(size, sequences, hooks, masks);
      // row i of the logits is sequence i's
      return {
        sampled: await this.#sampler.sampleRows(wanted, sequences.length, masks, hooks.sampling),
        promptLogprobs,
        failed: masks.failed,
      };
    }
    const plan = this.#upload(sequences, undefined, masks);
    this.#enqueue(plan, hooks);
    const sampled = await this.#sampleChosen(plan, wanted, masks, hooks);
    let first = 0;
    for (const sequence of sequences) {
      if (sequence.promptLogprobs) {
        const entries = await this.#sampler.promptLogprobs(first, sequence.promptLogprobs);
        promptLogprobs.set(sequence.sequenceId, entries);
      }
      first += sequence.tokens.length;
    }
    return { sampled, promptLogprobs, failed: masks.failed };
  }

  async logits(batch: ForwardBatch): Promise<Float32Array> {
    return this.#settled(() => this.#logitsOf(batch));
  }

  async #logitsOf(batch: ForwardBatch): Promise<Float32Array> {
    this.#begin(batch);
    const { sequences } = batch;
    const all = new Float32Array(sequences.length * this.vocabSize);
    const size = this.#graphSize(sequences);
    if (size !== undefined) {
      this.#launchGraph(size, sequences, {});
      await this.#sampler.readLogits(
        sequences.map((_, i) => i),
        (logits, i) => all.set(logits, i * this.vocabSize),
      );
      return all;
    }
    this.#enqueue(this.#upload(sequences), {});
    for (const [i, first] of lastRows(sequences).entries()) {
      this.#parts.model.score(1, { first });
      await this.#sampler.readLogits([0], (logits) => all.set(logits, i * this.vocabSize));
    }
    return all;
  }

  /** Records graphs for `sizes`, the smallest first. Before anything is served. */
  async capture(sizes: readonly number[]): Promise<void> {
    const { graphs, planDevice } = this.#parts;
    for (const size of sizes) {
      // once without a graph, so that whatever loads at first use has been loaded
      const plan = this.#upload([], size);
      this.#decodeStep(plan, planDevice.pointer);
      graphs.capture(size, () => this.#decodeStep(plan, planDevice.pointer));
      await this.#drained(`recording the decode step of ${size} sequences`);
    }
  }

  /** Runs a step of `rows` tokens whose KV goes nowhere. Before anything is served. */
  async warmUp(rows: number): Promise<void> {
    const { model, planDevice } = this.#parts;
    const plan = this.#send(planWarmUp(this.#plan, rows));
    model.embed(plan, planDevice.pointer);
    model.project(0, plan, planDevice.pointer);
    model.finish(0, plan, planDevice.pointer);
    await this.#drained('a first step');
  }

  /** After `warmUp`, which made logits. Before anything is served. */
  async warmUpSampling(): Promise<void> {
    await this.#sampler.warmUp();
  }

  /** Idempotent. Cache and weights are the device's. */
  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#releaseEvents();
    this.#poller.dispose();
    this.#parts.dispose();
  }

  #begin(batch: ForwardBatch): void {
    const { device, stream } = this.#parts;
    device.enter();
    this.#releaseEvents();
    for (const { source, target } of batch.blockCopies) {
      for (const { cache } of this.layers) {
        const { layout, memory } = cache;
        copyBlock(device, stream, layout, { memory, block: target }, { memory, block: source });
      }
    }
  }

  #graphSize(sequences: readonly ScheduledSequence[]): number | undefined {
    return isDecodeStep(sequences) ? this.#parts.graphs.sizeFor(sequences.length) : undefined;
  }

  #upload(sequences: readonly ScheduledSequence[], padTo?: number, masks?: StepMasks): StepPlan {
    const { limits, batchInvariant } = this.#parts;
    const options = {
      batchInvariant,
      ...(padTo !== undefined && { padTo }),
      ...(masks && { drawnLater: (sequence: ScheduledSequence) => isDrawnLater(sequence, masks) }),
    };
    return this.#send(planStep(this.#plan, sequences, limits, options));
  }

  #send(plan: StepPlan): StepPlan {
    const { device, stream, planHost, planDevice } = this.#parts;
    const bytes = 4 * plan.words;
    device.copy(sliceMemory(planDevice, 0, bytes), sliceMemory(planHost, 0, bytes), stream);
    return plan;
  }

  #enqueue(plan: StepPlan, hooks: LayerHooks): void {
    const { model, planDevice, layers, stream } = this.#parts;
    const step = planDevice.pointer;
    model.embed(plan, step);
    for (let layer = 0; layer < layers.length; layer++) {
      model.project(layer, plan, step);
      if (hooks.afterLayer) {
        const event = stream.record();
        this.#events.push(event);
        hooks.afterLayer(layer, event.ref);
      }
      model.finish(layer, plan, step);
    }
  }

  /** The content of a graph: a whole step of single tokens, each with its logits. */
  #decodeStep(plan: StepPlan, step: DevicePointer): void {
    const { model, layers } = this.#parts;
    model.embed(plan, step);
    for (let layer = 0; layer < layers.length; layer++) {
      model.project(layer, plan, step);
      model.finish(layer, plan, step);
    }
    model.score(plan.counts.rows, { draws: word(step, plan.at.draws) });
  }

  #launchGraph(
    size: number,
    sequences: readonly ScheduledSequence[],
    hooks: LayerHooks,
    masks?: StepMasks,
  ): void {
    const { graphs, layers, stream } = this.#parts;
    this.#upload(sequences, size, masks);
    graphs.launch(size);
    if (!hooks.afterLayer) return;
    // a graph ends as a whole, so one mark serves every layer
    const event = stream.record();
    this.#events.push(event);
    for (let layer = 0; layer < layers.length; layer++) hooks.afterLayer(layer, event.ref);
  }

  async #sampleChosen(
    plan: StepPlan,
    wanted: readonly SampledRow[],
    masks: StepMasks,
    { sampling }: StepHooks,
  ): Promise<SampledToken[]> {
    const { model, logitRows, planDevice } = this.#parts;
    const sampled: SampledToken[] = [];
    for (let i = 0; i < wanted.length; i += logitRows) {
      const part = wanted.slice(i, i + logitRows);
      const drawn = part.some(
        ({ sequence, sample: { params } }) => params.temperature > 0 && !isDrawnLater(sequence, masks),
      );
      model.score(part.length, {
        chosen: word(planDevice.pointer, plan.at.chosen + i),
        ...(drawn && { draws: word(planDevice.pointer, plan.at.draws + DRAW_WORDS * i) }),
      });
      const rows = part.map((entry, row) => ({ ...entry, row }));
      sampled.push(...(await this.#sampler.sampleRows(rows, part.length, masks, sampling)));
    }
    // also if nothing was sampled: the next step reuses the plan's memory
    if (wanted.length === 0) await this.#drained('a step');
    return sampled;
  }

  /** A step that failed half-way may still write to its blocks, which will soon belong to others, so it is waited for even then. */
  async #settled<T>(run: () => Promise<T>): Promise<T> {
    try {
      return await run();
    } catch (error) {
      this.#sampler.forget();
      await this.#drained('a step that failed').catch(() => {});
      throw error;
    }
  }

  #drained(what: string): Promise<void> {
    const { stream, device } = this.#parts;
    return this.#poller.drained(stream, STEP_TIMEOUT, `${what} on ${device.name}`);
  }

  #releaseEvents(): void {
    for (const event of this.#events.splice(0)) event.dispose();
  }
}

function isDrawnLater({ sequenceId, sample }: ScheduledSequence, masks: StepMasks): boolean {
  return sample !== undefined && (isShaped(sample) || masks.has(sequenceId));
}
