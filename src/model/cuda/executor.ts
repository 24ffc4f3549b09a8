/**
 * Runs steps on a GPU. Everything is enqueued on one stream and the thread polls the end of it, so messages are heard while the GPU
 * computes. Memory is taken when the executor is made; a step takes none.
 */
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { CudaStream } from '../../device/cuda/stream.ts';
import type { DeviceEvent, DevicePointer, MemoryRef } from '../../device/device.ts';
import { sliceMemory } from '../../device/memory.ts';
import { EventPoller } from '../../device/poller.ts';
import { PdError } from '../../errors.ts';
import type { NamedLayer } from '../../kv/paged-cache.ts';
import type {
  ForwardBatch,
  ForwardResult,
  SampledToken,
  ScheduledSequence,
  TokenLogprob,
} from '../../scheduler/types.ts';
import type { Executor, LayerHooks } from '../executor.ts';
import { logprobOf, sample } from '../sampler.ts';
import { copyCacheBlocks } from './block-copies.ts';
import type { DecodeGraphs } from './graphs.ts';
import { type CudaLlama, word } from './llama.ts';
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
/** Rows of logits that the host reads at a time. */
export const HOST_LOGIT_ROWS = 16;

/** What `create.ts` has put together; the executor owns and disposes it. */
export interface CudaExecutorParts {
  readonly device: CudaDevice;
  readonly stream: CudaStream;
  readonly model: CudaLlama;
  readonly layers: readonly NamedLayer[];
  readonly limits: PlanLimits;
  readonly batchInvariant: boolean;
  readonly logitRows: number;
  /** Page-locked and on the GPU: the step's plan. */
  readonly planHost: MemoryRef;
  readonly planDevice: MemoryRef & { readonly kind: 'cuda' };
  /** Page-locked: tokens [sequences], then logits [HOST_LOGIT_ROWS, vocab]. */
  readonly tokensHost: MemoryRef;
  readonly logitsHost: MemoryRef;
  readonly graphs: DecodeGraphs;
  readonly dispose: () => void;
}

interface Wanted {
  readonly sequence: ScheduledSequence;
  readonly sample: NonNullable<ScheduledSequence['sample']>;
}

export class CudaExecutor implements Executor {
  readonly layers: readonly NamedLayer[];
  readonly vocabSize: number;
  readonly #parts: CudaExecutorParts;
  readonly #poller = new EventPoller();
  readonly #plan: Int32Array;
  readonly #tokens: Int32Array;
  readonly #logits: Float32Array;
  /** Marks of the last step's layers. They may be recorded anew once the connector has gathered what came before them. */
  #events: DeviceEvent[] = [];
  #disposed = false;

  constructor(parts: CudaExecutorParts) {
    this.#parts = parts;
    this.layers = parts.layers;
    this.vocabSize = parts.limits.vocab;
    const { device } = parts;
    this.#plan = int32(device.view(parts.planHost));
    this.#tokens = int32(device.view(parts.tokensHost));
    const logits = device.view(parts.logitsHost);
    this.#logits = new Float32Array(logits.buffer, logits.byteOffset, logits.byteLength / 4);
  }

  async forward(batch: ForwardBatch, hooks: LayerHooks): Promise<ForwardResult> {
    return this.#settled(() => this.#forward(batch, hooks));
  }

  async #forward(batch: ForwardBatch, hooks: LayerHooks): Promise<ForwardResult> {
    this.#begin(batch);
    const { sequences } = batch;
    const wanted = wantedOf(sequences);
    const promptLogprobs = new Map<string, readonly TokenLogprob[]>();
    const size = hooks.beforeLayer ? undefined : this.#graphSize(sequences);
    if (size !== undefined) {
      this.#launchGraph(size, sequences, hooks);
      return { sampled: await this.#sampleDecoded(sequences), promptLogprobs };
    }
    const plan = this.#upload(sequences);
    await this.#enqueue(plan, hooks);
    const sampled = await this.#sampleChosen(plan, wanted);
    let first = 0;
    for (const sequence of sequences) {
      if (sequence.promptLogprobs) {
        const entries = await this.#promptLogprobs(first, sequence.promptLogprobs);
        promptLogprobs.set(sequence.sequenceId, entries);
      }
      first += sequence.tokens.length;
    }
    return { sampled, promptLogprobs };
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
      await this.#readLogits(
        sequences.map((_, i) => i),
        (logits, i) => all.set(logits, i * this.vocabSize),
      );
      return all;
    }
    await this.#enqueue(this.#upload(sequences), {});
    let row = 0;
    for (const [i, { tokens }] of sequences.entries()) {
      row += tokens.length;
      this.#parts.model.score(1, { first: row - 1 });
      await this.#readLogits([0], (logits) => all.set(logits, i * this.vocabSize));
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
    copyCacheBlocks(device, stream, this.layers, batch.blockCopies);
  }

  #graphSize(sequences: readonly ScheduledSequence[]): number | undefined {
    return isDecodeStep(sequences) ? this.#parts.graphs.sizeFor(sequences.length) : undefined;
  }

  #upload(sequences: readonly ScheduledSequence[], padTo?: number): StepPlan {
    const { limits, batchInvariant } = this.#parts;
    const options = { batchInvariant, ...(padTo !== undefined && { padTo }) };
    return this.#send(planStep(this.#plan, sequences, limits, options));
  }

  #send(plan: StepPlan): StepPlan {
    const { device, stream, planHost, planDevice } = this.#parts;
    const bytes = 4 * plan.words;
    device.copy(sliceMemory(planDevice, 0, bytes), sliceMemory(planHost, 0, bytes), stream);
    return plan;
  }

  async #enqueue(plan: StepPlan, hooks: LayerHooks): Promise<void> {
    const { model, planDevice, layers, stream } = this.#parts;
    const step = planDevice.pointer;
    model.embed(plan, step);
    for (let layer = 0; layer < layers.length; layer++) {
      if (hooks.beforeLayer) await hooks.beforeLayer(layer);
      model.project(layer, plan, step);
      if (hooks.afterLayer) {
        const event = stream.record();
        this.#events.push(event);
        hooks.afterLayer(layer, event.ref);
      }
      model.finish(layer, plan, step);
    }
  }

  /** What a graph holds: a whole step of single tokens, each with its logits. */
  #decodeStep(plan: StepPlan, step: DevicePointer): void {
    const { model, layers } = this.#parts;
    model.embed(plan, step);
    for (let layer = 0; layer < layers.length; layer++) {
      model.project(layer, plan, step);
      model.finish(layer, plan, step);
    }
    model.score(plan.counts.rows, { draws: word(step, plan.at.draws) });
  }

  #launchGraph(size: number, sequences: readonly ScheduledSequence[], hooks: LayerHooks): void {
    const { graphs, layers, stream } = this.#parts;
    this.#upload(sequences, size);
    graphs.launch(size);
    if (!hooks.afterLayer) return;
    // a graph ends as a whole, so one mark serves every layer
    const event = stream.record();
    this.#events.push(event);
    for (let layer = 0; layer < layers.length; layer++) hooks.afterLayer(layer, event.ref);
  }

  /** After a graph: row i of the logits is sequence i's. */
  async #sampleDecoded(sequences: readonly ScheduledSequence[]): Promise<SampledToken[]> {
    const rows = sequences.flatMap((sequence, row) =>
      sequence.sample ? [{ row, sequence, sample: sequence.sample }] : [],
    );
    return this.#sampleRows(rows, sequences.length);
  }

  async #sampleChosen(plan: StepPlan, wanted: readonly Wanted[]): Promise<SampledToken[]> {
    const { model, logitRows, planDevice } = this.#parts;
    const sampled: SampledToken[] = [];
    for (let i = 0; i < wanted.length; i += logitRows) {
      const part = wanted.slice(i, i + logitRows);
      const drawn = part.some(({ sample: { params } }) => params.temperature > 0);
      model.score(part.length, {
        chosen: word(planDevice.pointer, plan.at.chosen + i),
        ...(drawn && { draws: word(planDevice.pointer, plan.at.draws + DRAW_WORDS * i) }),
      });
      const rows = part.map((entry, row) => ({ ...entry, row }));
      sampled.push(...(await this.#sampleRows(rows, part.length)));
    }
    // also where nothing was sampled: the plan's memory is the next step's
    if (wanted.length === 0) await this.#drained('a step');
    return sampled;
  }

  /** Tokens come from the GPU; what asks for log-probabilities or bans tokens is sampled here, from its logits. */
  async #sampleRows(
    rows: readonly (Wanted & { readonly row: number })[],
    scored: number,
  ): Promise<SampledToken[]> {
    const { device, stream, model, tokensHost } = this.#parts;
    const bytes = 4 * scored;
    const tokens = cudaMemory(device, model.tokens, bytes);
    device.copy(sliceMemory(tokensHost, 0, bytes), tokens, stream);
    await this.#drained(`a step of ${scored} sequences`);
    const drawn = new Map<number, SampledToken>();
    const onHost = rows.filter(({ sample: spec }) => !isTokenAlone(spec));
    await this.#readLogits(
      onHost.map(({ row }) => row),
      (logits, i) => {
        const { row, sequence, sample: spec } = onHost[i]!;
        drawn.set(row, { sequenceId: sequence.sequenceId, ...sample(logits, spec) });
      },
    );
    return rows.map(({ row, sequence }) => drawn.get(row) ?? this.#token(row, sequence));
  }

  #token(row: number, { sequenceId }: ScheduledSequence): SampledToken {
    const token = this.#tokens[row]!;
    if (token >= 0) return { sequenceId, token };
    throw new PdError(
      'INTERNAL',
      `sequence ${sequenceId}: the highest of ${this.vocabSize} logits is no finite number: the model computed no usable distribution`,
    );
  }

  /** Calls `take` with each of these rows of the logits and its place in `rows`. */
  async #readLogits(
    rows: readonly number[],
    take: (logits: Float32Array, index: number) => void,
  ): Promise<void> {
    const { device, stream, model, logitsHost } = this.#parts;
    const bytes = 4 * this.vocabSize;
    for (let first = 0; first < rows.length; first += HOST_LOGIT_ROWS) {
      const part = rows.slice(first, first + HOST_LOGIT_ROWS);
      part.forEach((row, i) => {
        const source = cudaMemory(device, (model.logits + BigInt(row * bytes)) as DevicePointer, bytes);
        device.copy(sliceMemory(logitsHost, i * bytes, bytes), source, stream);
      });
      await this.#drained('reading logits');
      part.forEach((_, i) => {
        take(this.#logits.subarray(i * this.vocabSize, (i + 1) * this.vocabSize), first + i);
      });
    }
  }

  async #promptLogprobs(
    first: number,
    { count, targets }: NonNullable<ScheduledSequence['promptLogprobs']>,
  ): Promise<readonly TokenLogprob[]> {
    const entries: TokenLogprob[] = [];
    const most = Math.min(HOST_LOGIT_ROWS, this.#parts.logitRows);
    for (let i = 0; i < targets.length; i += most) {
      const rows = Math.min(most, targets.length - i);
      this.#parts.model.score(rows, { first: first + i });
      const indices = Array.from({ length: rows }, (_, row) => row);
      await this.#readLogits(indices, (logits, row) => {
        entries.push(logprobOf(logits, targets[i + row]!, count));
      });
    }
    return entries;
  }

  /** A step that failed half-way goes on writing into its blocks, which will be others'; so it is waited for all the same. */
  async #settled<T>(run: () => Promise<T>): Promise<T> {
    try {
      return await run();
    } catch (error) {
      await this.#drained('a step that failed').catch(() => {});
      throw error;
    }
  }

  async #drained(what: string): Promise<void> {
    const { stream, device } = this.#parts;
    const event = stream.record();
    try {
      await this.#poller.wait(event, STEP_TIMEOUT, `${what} on ${device.name}`);
    } finally {
      event.dispose();
    }
  }

  #releaseEvents(): void {
    for (const event of this.#events.splice(0)) event.dispose();
  }
}

/** A token and nothing about it, of all that there are. */
function isTokenAlone({ params, outputPosition }: NonNullable<ScheduledSequence['sample']>): boolean {
  const banned = outputPosition < params.minTokens && params.stopTokenIds.length > 0;
  return params.logprobs === undefined && !banned;
}

function wantedOf(sequences: readonly ScheduledSequence[]): Wanted[] {
  return sequences.flatMap((sequence) => (sequence.sample ? [{ sequence, sample: sequence.sample }] : []));
}

function cudaMemory(device: CudaDevice, pointer: DevicePointer, bytes: number): MemoryRef {
  return { kind: 'cuda', device: device.index, pointer, bytes };
}

function int32(bytes: Uint8Array): Int32Array {
  return new Int32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
}
