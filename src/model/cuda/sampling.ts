/** From logits on the GPU to tokens: drawn there, or here where more is asked than a token. */
import type { CudaDevice } from '../../device/cuda/device.ts';
import type { CudaStream } from '../../device/cuda/stream.ts';
import type { DevicePointer, MemoryRef } from '../../device/device.ts';
import { sliceMemory } from '../../device/memory.ts';
import type { SampledToken, ScheduledSequence } from '../../scheduler/types.ts';
import type { TokenLogprob } from '../../wire/token-logprob.ts';
import type { StepHooks } from '../executor.ts';
import type { StepMasks } from '../masks.ts';
import type { SampledRow } from '../rows.ts';
import { noDistribution, promptLogprobOf, sample } from '../sampler.ts';
import { nothingLeft, shapingOf } from '../shaping.ts';
import type { CudaLlama } from './llama.ts';

/** Rows of logits that the host reads at a time. */
export const HOST_LOGIT_ROWS = 16;

export interface SamplerParts {
  readonly device: CudaDevice;
  readonly stream: CudaStream;
  readonly model: CudaLlama;
  readonly logitRows: number;
  /** Page-locked: tokens of one scoring, and logits [HOST_LOGIT_ROWS, vocab]. */
  readonly tokensHost: MemoryRef;
  readonly logitsHost: MemoryRef;
  readonly limits: { readonly vocab: number };
}

export class CudaSampler {
  readonly vocabSize: number;
  readonly #parts: SamplerParts;
  /** Resolves when the stream has run everything enqueued until now. */
  readonly #drained: (what: string) => Promise<void>;
  readonly #tokens: Int32Array;
  readonly #logits: Float32Array;

  constructor(parts: SamplerParts, drained: (what: string) => Promise<void>) {
    this.vocabSize = parts.limits.vocab;
    this.#parts = parts;
    this.#drained = drained;
    const tokens = parts.device.view(parts.tokensHost);
    this.#tokens = new Int32Array(tokens.buffer, tokens.byteOffset, tokens.byteLength / 4);
    const logits = parts.device.view(parts.logitsHost);
    this.#logits = new Float32Array(logits.buffer, logits.byteOffset, logits.byteLength / 4);
  }

  /** Tokens come from the GPU; what asks for more than temperature, top-k and top-p is sampled here, from its logits. */
  async sampleRows(
    rows: readonly SampledRow[],
    scored: number,
    masks: StepMasks,
    sampling?: StepHooks['sampling'],
  ): Promise<SampledToken[]> {
    const { device, stream, model, tokensHost } = this.#parts;
    const bytes = 4 * scored;
    const tokens = cudaMemory(device, model.tokens, bytes);
    device.copy(sliceMemory(tokensHost, 0, bytes), tokens, stream);
    await masks.settle();
    await this.#drained(`a step of ${scored} sequences`);
    const drawn = new Map<number, SampledToken>();
    const alone = (row: SampledRow) => this.#isTokenAlone(row, masks);
    const read = sampling ? rows : rows.filter((row) => !alone(row));
    await this.readLogits(
      read.map(({ row }) => row),
      (logits, i) => {
        const { row, sequence, sample: spec } = read[i]!;
        const { sequenceId } = sequence;
        sampling?.(sequence, logits);
        if (alone(read[i]!) || masks.failed.has(sequenceId)) return;
        const token = sample(logits, spec, masks.of(sequenceId));
        if (token) drawn.set(row, { sequenceId, ...token });
        else masks.failed.set(sequenceId, nothingLeft(sequenceId).toData());
      },
    );
    return rows
      .filter(({ sequence }) => !masks.failed.has(sequence.sequenceId))
      .map(({ row, sequence }) => drawn.get(row) ?? this.#token(row, sequence));
  }

  /** A token and nothing about it, of all that there are. */
  #isTokenAlone({ sequence: { sequenceId }, sample: spec }: SampledRow, masks: StepMasks): boolean {
    const { logprobs, minP = 0 } = spec.params;
    if (logprobs !== undefined || minP > 0 || masks.has(sequenceId)) return false;
    return shapingOf(spec, this.vocabSize) === undefined;
  }

  #token(row: number, { sequenceId }: ScheduledSequence): SampledToken {
    const token = this.#tokens[row]!;
    if (token >= 0) return { sequenceId, token };
    throw noDistribution(
      `sequence ${sequenceId}: the highest of ${this.vocabSize} logits is no finite number`,
    );
  }

  /** Calls `take` with each of these rows of the logits and its place in `rows`. */
  async readLogits(
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

  /** Log-probabilities of `targets`, the tokens after the rows from `first` on. */
  async promptLogprobs(
    first: number,
    { count, targets }: NonNullable<ScheduledSequence['promptLogprobs']>,
  ): Promise<readonly TokenLogprob[]> {
    const entries: TokenLogprob[] = [];
    const most = Math.min(HOST_LOGIT_ROWS, this.#parts.logitRows);
    for (let i = 0; i < targets.length; i += most) {
      const rows = Math.min(most, targets.length - i);
      this.#parts.model.score(rows, { first: first + i });
      const indices = Array.from({ length: rows }, (_, row) => row);
      await this.readLogits(indices, (logits, row) => {
        entries.push(promptLogprobOf(logits, targets[i + row]!, count));
      });
    }
    return entries;
  }
}

function cudaMemory(device: CudaDevice, pointer: DevicePointer, bytes: number): MemoryRef {
  return { kind: 'cuda', device: device.index, pointer, bytes };
}
