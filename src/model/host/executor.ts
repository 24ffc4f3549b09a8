/** Runs steps on the host: float32 arithmetic over a paged KV cache that lies in host memory, or in GPU memory behind a mirror. */
import type { Device } from '../../device/device.ts';
import type { CacheAllocator, NamedLayer } from '../../device/paged-cache.ts';
import type { ForwardBatch, ForwardResult, SampledToken, ScheduledSequence } from '../../scheduler/types.ts';
import type { TokenLogprob } from '../../wire/token-logprob.ts';
import type { ModelConfig } from '../config.ts';
import type { Executor, LayerHooks, StepHooks } from '../executor.ts';
import { allocateKvCache } from '../kv-cache.ts';
import { StepMasks } from '../masks.ts';
import { lastRows, sampledRows } from '../rows.ts';
import { promptLogprobOf, sample } from '../sampler.ts';
import { nothingLeft } from '../shaping.ts';
import { type HostCaches, openHostCaches } from './caches.ts';
import { HostLlama } from './llama.ts';
import { type LlamaWeights, loadLlamaWeights } from './weights.ts';

/** Rows of logits computed at a time: a long prompt's log-probabilities must not take [tokens, vocab] of memory. */
const LOGIT_ROWS = 32;

export interface HostExecutorOptions {
  readonly dir: string;
  readonly config: ModelConfig;
  readonly device: Device;
  readonly blockSize: number;
  readonly numBlocks: number;
  readonly allocateCache?: CacheAllocator | undefined;
}

export class HostExecutor implements Executor {
  readonly layers: readonly NamedLayer[];
  readonly vocabSize: number;
  readonly #caches: HostCaches;
  readonly #model: HostLlama;

  private constructor(
    config: ModelConfig,
    weights: LlamaWeights,
    layers: readonly NamedLayer[],
    caches: HostCaches,
  ) {
    this.layers = layers;
    this.vocabSize = config.vocab;
    this.#caches = caches;
    this.#model = new HostLlama(config, weights, caches.layers);
  }

  /** Throws CHECKPOINT_INVALID for weights that do not fit the configuration, OUT_OF_DEVICE_MEMORY for a cache that is too large. */
  static async create({
    dir,
    config,
    device,
    blockSize,
    numBlocks,
    allocateCache,
  }: HostExecutorOptions): Promise<HostExecutor> {
    const weights = await loadLlamaWeights(dir, config);
    const format = { dtype: 'float32', blockSize } as const;
    const layers = await allocateKvCache(device, config, format, numBlocks, allocateCache);
    return new HostExecutor(config, weights, layers, await openHostCaches(device, layers));
  }

  async forward(batch: ForwardBatch, hooks: StepHooks): Promise<ForwardResult> {
    const masks = new StepMasks(batch.sequences, hooks);
    const hidden = await this.#run(batch, hooks);
    await masks.settle();
    const sampled: SampledToken[] = [];
    const promptLogprobs = new Map<string, readonly TokenLogprob[]>();
    let first = 0;
    for (const sequence of batch.sequences) {
      if (sequence.promptLogprobs) {
        promptLogprobs.set(sequence.sequenceId, this.#promptLogprobs(hidden, first, sequence.promptLogprobs));
      }
      first += sequence.tokens.length;
    }
    const ends = sampledRows(batch.sequences);
    const { vocabSize } = this;
    for (let i = 0; i < ends.length; i += LOGIT_ROWS) {
      const chunk = ends.slice(i, i + LOGIT_ROWS);
      const logits = this.#model.logits(
        hidden,
        chunk.map(({ row }) => row),
      );
      chunk.forEach(({ sequence, sample: spec }, k) => {
        const row = logits.subarray(k * vocabSize, (k + 1) * vocabSize);
        hooks.sampling?.(sequence, row);
        const { sequenceId } = sequence;
        if (masks.failed.has(sequenceId)) return;
        const token = sample(row, spec, masks.of(sequenceId));
        if (token) sampled.push({ sequenceId, ...token });
        else masks.failed.set(sequenceId, nothingLeft(sequenceId, spec).toData());
      });
    }
    return { sampled, promptLogprobs, failed: masks.failed };
  }

  async logits(batch: ForwardBatch): Promise<Float32Array> {
    const hidden = await this.#run(batch, {});
    return this.#model.logits(hidden, lastRows(batch.sequences));
  }

  /** Idempotent. The cache is the device's. */
  dispose(): void {
    this.#caches.dispose();
  }

  async #run(batch: ForwardBatch, hooks: LayerHooks): Promise<Float32Array> {
    await this.#caches.prepare(batch);
    return this.#model.hidden(batch.sequences, (layer) => {
      const uploaded = this.#caches.written(layer, batch);
      if (uploaded) return uploaded.then(() => hooks.afterLayer?.(layer));
      return hooks.afterLayer?.(layer);
    });
  }

  #promptLogprobs(
    hidden: Float32Array,
    first: number,
    { count, targets }: NonNullable<ScheduledSequence['promptLogprobs']>,
  ): readonly TokenLogprob[] {
    const entries: TokenLogprob[] = [];
    for (let i = 0; i < targets.length; i += LOGIT_ROWS) {
      const rows = Array.from({ length: Math.min(LOGIT_ROWS, targets.length - i) }, (_, k) => first + i + k);
      const logits = this.#model.logits(hidden, rows);
      rows.forEach((_, k) => {
        const row = logits.subarray(k * this.vocabSize, (k + 1) * this.vocabSize);
        entries.push(promptLogprobOf(row, targets[i + k]!, count));
      });
    }
    return entries;
  }
}
