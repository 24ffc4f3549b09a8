/**
 * From logits on the GPU to tokens and log-probabilities. A plain draw comes with the logits (`CudaLlama.score`). Rows that are banned,
 * biased or penalized are drawn here, from a shaped copy of their logits, and log-probabilities are computed from the raw ones: a few
 * launches after the step, for those rows only.
 */
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { CudaStream } from '../../device/cuda/stream.ts';
import type { DevicePointer, MemoryRef } from '../../device/device.ts';
import { float32View, int32View, sliceMemory } from '../../device/memory.ts';
import type { SampledToken, ScheduledSequence } from '../../scheduler/types.ts';
import type { TokenLogprob } from '../../wire/token-logprob.ts';
import type { StepHooks } from '../executor.ts';
import type { StepMasks } from '../masks.ts';
import type { SampledRow } from '../rows.ts';
import { GREEDY, noDistribution } from '../sampler.ts';
import { isShaped, nothingLeft, shapingOf } from '../shaping.ts';
import type { ModelKernels } from './kernels.ts';
import { type CudaLlama, word } from './llama.ts';
import {
  CountSlots,
  MOST_REPORTED,
  REPORT_WORDS,
  SamplePlan,
  type SamplePlanLimits,
  samplePlanCapacity,
} from './sample-plan.ts';

/** Rows of logits read by the host at a time. */
const HOST_LOGIT_ROWS = 16;
/** Most rows that are shaped at a time; 64 of 128k tokens take 31 MiB, and as much to count their tokens. */
const SHAPED_ROWS = 64;

/** Memory of the sampler, taken once. */
export interface SamplerMemory {
  readonly limits: SamplePlanLimits;
  /** Page-locked and on the GPU: a SamplePlan. */
  readonly planHost: MemoryRef;
  readonly planDevice: MemoryRef & { readonly kind: 'cuda' };
  /** float32 [shapes, vocab]. */
  readonly shaped: DevicePointer;
  /** uint32 [shapes, vocab]. */
  readonly counts: DevicePointer;
  /** [reports, REPORT_WORDS]. */
  readonly reports: MemoryRef & { readonly kind: 'cuda' };
  readonly reportsHost: MemoryRef;
  /** Page-locked: tokens of one scoring and of shaped rows behind them, and logits [HOST_LOGIT_ROWS, vocab]. */
  readonly tokensHost: MemoryRef;
  readonly logitsHost: MemoryRef;
}

/** Rows that are shaped at a time where a step has at most `logitRows` rows of logits. */
export function shapedRows(logitRows: number): number {
  return Math.min(logitRows, SHAPED_ROWS);
}

/** `maxLength`: most tokens of a sequence. Throws OUT_OF_DEVICE_MEMORY. */
export async function takeSamplerMemory(
  device: CudaDevice,
  logitRows: number,
  vocab: number,
  maxLength: number,
): Promise<SamplerMemory> {
  const shapes = shapedRows(logitRows);
  const limits = { shapes, reports: logitRows, vocab, maxLength };
  const planBytes = 4 * samplePlanCapacity(limits);
  const reportBytes = 4 * REPORT_WORDS * logitRows;
  return {
    limits,
    planHost: await device.allocatePinned(planBytes, 'plan of sampling'),
    planDevice: device.allocate(planBytes, 'plan of sampling'),
    shaped: device.allocate(4 * shapes * vocab, 'shaped logits').pointer,
    counts: device.allocate(4 * shapes * vocab, 'counts of tokens').pointer,
    reports: device.allocate(reportBytes, 'log-probabilities'),
    reportsHost: await device.allocatePinned(reportBytes, 'log-probabilities'),
    tokensHost: await device.allocatePinned(4 * (logitRows + shapes), 'sampled tokens'),
    logitsHost: await device.allocatePinned(4 * HOST_LOGIT_ROWS * vocab, 'logits'),
  };
}

export interface SamplerParts {
  readonly device: CudaDevice;
  readonly stream: CudaStream;
  readonly model: CudaLlama;
  readonly kernels: ModelKernels;
  readonly sampler: SamplerMemory;
}

/** A row that is more than a plain draw, within one plan. */
interface Special {
  readonly row: SampledRow;
  /** Its place among the shaped rows, and among the reports. */
  readonly shape: number | undefined;
  readonly report: number | undefined;
}

export class CudaSampler {
  readonly vocabSize: number;
  readonly #parts: SamplerParts;
  /** Resolves when the stream has run everything enqueued until now. */
  readonly #drained: (what: string) => Promise<void>;
  readonly #slots: CountSlots;
  readonly #plan: SamplePlan;
  readonly #tokens: Int32Array;
  readonly #logits: Float32Array;
  readonly #reports: Int32Array;
  readonly #reportFloats: Float32Array;

  constructor(parts: SamplerParts, drained: (what: string) => Promise<void>) {
    const { device, sampler } = parts;
    this.vocabSize = sampler.limits.vocab;
    this.#parts = parts;
    this.#drained = drained;
    this.#slots = new CountSlots(sampler.limits.shapes);
    this.#plan = new SamplePlan(int32View(device.view(sampler.planHost)), sampler.limits, this.#slots);
    this.#tokens = int32View(device.view(sampler.tokensHost));
    this.#logits = float32View(device.view(sampler.logitsHost));
    const reports = device.view(sampler.reportsHost);
    this.#reports = int32View(reports);
    this.#reportFloats = float32View(reports);
  }

  /** A step failed: the counts on the GPU are no longer known. */
  forget(): void {
    this.#slots.forget();
  }

  /** Runs every kernel once. Before anything is served. */
  async warmUp(): Promise<void> {
    const params = { ...GREEDY, temperature: 1 };
    this.#plan.clear();
    this.#plan.shape(0, { edits: new Map() }, { params, index: 0, outputPosition: 0 });
    this.#plan.report(0, this.#parts.sampler.limits.reports, 0);
    this.#enqueue();
    await this.#drained('a first draw');
  }

  /**
   * Samples rows whose logits, and plain draws, are already enqueued. Sequences that get no token are in `masks.failed` afterwards. Throws
   * INTERNAL if the model computed no usable distribution.
   */
  async sampleRows(
    rows: readonly SampledRow[],
    scored: number,
    masks: StepMasks,
    sampling?: StepHooks['sampling'],
  ): Promise<SampledToken[]> {
    const { device, stream, model, sampler } = this.#parts;
    device.copy(
      sliceMemory(sampler.tokensHost, 0, 4 * scored),
      this.#memory(model.tokens, 4 * scored),
      stream,
    );
    await masks.settle();
    const found = new Map<number, SampledToken>();
    let rest = rows.filter(({ sequence, sample }) => {
      const { sequenceId } = sequence;
      if (masks.failed.has(sequenceId)) return false;
      return sample.params.logprobs !== undefined || isShaped(sample) || masks.has(sequenceId);
    });
    do {
      const specials = this.#planPart(rest, masks);
      rest = rest.slice(specials.length);
      if (specials.length > 0) this.#enqueue();
      await this.#drained(`a step of ${scored} sequences`);
      for (const special of specials) this.#take(special, masks, found);
    } while (rest.length > 0);
    if (sampling) {
      const numbers = rows.map(({ row }) => row);
      await this.readLogits(numbers, (logits, i) => sampling(rows[i]!.sequence, logits));
    }
    return rows
      .filter(({ sequence }) => !masks.failed.has(sequence.sequenceId))
      .map(({ row, sequence }) => found.get(row) ?? this.#plainToken(row, sequence));
  }

  /** As many of `rows` as one plan takes, at least one. */
  #planPart(rows: readonly SampledRow[], masks: StepMasks): Special[] {
    const plan = this.#plan;
    const { reports } = this.#parts.sampler.limits;
    plan.clear();
    const specials: Special[] = [];
    for (const each of rows) {
      const { row, sequence, sample } = each;
      const { logprobs } = sample.params;
      const mask = masks.of(sequence.sequenceId);
      let shape: number | undefined;
      if (mask || isShaped(sample)) {
        shape = plan.shape(row, shapingOf(sample, this.vocabSize, mask), sample);
        if (shape === undefined) break;
      }
      const token = shape === undefined ? row : reports + shape;
      const report = logprobs === undefined ? undefined : plan.report(row, token, logprobs);
      specials.push({ row: each, shape, report });
    }
    return specials;
  }

  /** What the plan says, and its results to the host. */
  #enqueue(): void {
    const { device, stream, model, kernels, sampler } = this.#parts;
    const { shaped, counts, limits, tokensHost, planDevice } = sampler;
    const { vocab, reports } = limits;
    const { at, shapes: rows } = this.#plan;
    this.#upload();
    if (rows > 0) {
      const of = (part: number) => word(planDevice.pointer, part);
      const { logits } = model;
      const tokens = word(model.tokens, reports);
      kernels.shapeLogits({ logits, shaped, shapes: of(at.shapes), data: of(at.data), counts, rows, vocab });
      kernels.argmax({ tokens, logits: shaped, rows, vocab });
      kernels.draw({ tokens, logits: shaped, draws: of(at.draws), rows, vocab });
      device.copy(sliceMemory(tokensHost, 4 * reports, 4 * rows), this.#memory(tokens, 4 * rows), stream);
    }
    if (this.#plan.reports > 0) this.#report(model.tokens);
  }

  #upload(): void {
    const { device, stream, sampler } = this.#parts;
    const bytes = 4 * this.#plan.words;
    device.copy(sliceMemory(sampler.planDevice, 0, bytes), sliceMemory(sampler.planHost, 0, bytes), stream);
  }

  #report(tokens: DevicePointer): void {
    const { device, stream, model, kernels, sampler } = this.#parts;
    const { reports, reportsHost, planDevice, limits } = sampler;
    const wanted = word(planDevice.pointer, this.#plan.at.wanted);
    const count = this.#plan.reports;
    kernels.report({
      logits: model.logits,
      tokens,
      wanted,
      reports: reports.pointer,
      count,
      vocab: limits.vocab,
    });
    const bytes = 4 * REPORT_WORDS * count;
    device.copy(sliceMemory(reportsHost, 0, bytes), sliceMemory(reports, 0, bytes), stream);
  }

  #take(
    { row: { row, sequence, sample }, shape, report }: Special,
    masks: StepMasks,
    found: Map<number, SampledToken>,
  ): void {
    const { sequenceId } = sequence;
    const plain = this.#plainToken(row, sequence);
    const token =
      shape === undefined ? plain.token : this.#tokens[this.#parts.sampler.limits.reports + shape]!;
    if (token < 0) {
      masks.failed.set(sequenceId, nothingLeft(sequenceId, sample).toData());
      return;
    }
    const { logprobs } = sample.params;
    if (report === undefined || logprobs === undefined) found.set(row, { sequenceId, token });
    else found.set(row, { sequenceId, token, logprob: this.#reported(report, token, logprobs) });
  }

  #plainToken(row: number, { sequenceId }: ScheduledSequence): SampledToken {
    const token = this.#tokens[row]!;
    if (token >= 0) return { sequenceId, token };
    throw noDistribution(
      `sequence ${sequenceId}: the highest of ${this.vocabSize} logits is no finite number`,
    );
  }

  #reported(report: number, token: number, count: number): TokenLogprob {
    const at = report * REPORT_WORDS;
    const top: { readonly token: number; readonly logprob: number }[] = [];
    for (let i = 0; i < Math.min(count, MOST_REPORTED); i++) {
      const id = this.#reports[at + 2 + i]!;
      if (id < this.vocabSize)
        top.push({ token: id, logprob: this.#reportFloats[at + 2 + MOST_REPORTED + i]! });
    }
    return { token, logprob: this.#reportFloats[at]!, top };
  }

  /** Calls `take` with each of these rows of the logits and its place in `rows`. */
  async readLogits(
    rows: readonly number[],
    take: (logits: Float32Array, index: number) => void,
  ): Promise<void> {
    const { device, stream, model, sampler } = this.#parts;
    const bytes = 4 * this.vocabSize;
    for (let first = 0; first < rows.length; first += HOST_LOGIT_ROWS) {
      const part = rows.slice(first, first + HOST_LOGIT_ROWS);
      part.forEach((row, i) => {
        const source = this.#memory((model.logits + BigInt(row * bytes)) as DevicePointer, bytes);
        device.copy(sliceMemory(sampler.logitsHost, i * bytes, bytes), source, stream);
      });
      await this.#drained('reading logits');
      part.forEach((_, i) => {
        take(this.#logits.subarray(i * this.vocabSize, (i + 1) * this.vocabSize), first + i);
      });
    }
  }

  /** Log-probabilities of `targets`, the tokens after the rows from `first` on. Throws INTERNAL for logits that are no distribution. */
  async promptLogprobs(
    first: number,
    { count, targets }: NonNullable<ScheduledSequence['promptLogprobs']>,
  ): Promise<readonly TokenLogprob[]> {
    const { model, sampler } = this.#parts;
    const entries: TokenLogprob[] = [];
    const most = sampler.limits.reports;
    for (let i = 0; i < targets.length; i += most) {
      const part = targets.subarray(i, i + most);
      this.#plan.clear();
      for (let row = 0; row < part.length; row++) this.#plan.report(row, row, count);
      const tokens = word(sampler.planDevice.pointer, this.#plan.tokens(part));
      this.#upload();
      model.score(part.length, { first: first + i });
      this.#report(tokens);
      await this.#drained('log-probabilities of a prompt');
      part.forEach((token, row) => {
        const entry = this.#reported(row, token, count);
        if (Number.isNaN(entry.logprob))
          throw noDistribution(`logits of a prompt's token ${first + i + row}`);
        entries.push({ ...entry, rank: this.#reports[row * REPORT_WORDS + 1]! });
      });
    }
    return entries;
  }

  #memory(pointer: DevicePointer, bytes: number): MemoryRef {
    return { kind: 'cuda', device: this.#parts.device.index, pointer, bytes };
  }
}
