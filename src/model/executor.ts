/** Computes steps on a device: the one interface between scheduler and model. Nothing above it knows which device it is. */
import type { EventRef, PagedLayer } from '../device/device.ts';
import type { ForwardBatch, ForwardResult, ScheduledSequence } from '../scheduler/types.ts';

export interface LayerHooks {
  /** Layer `index` has written its KV of this step, or will have when `ready` fires (absent: it has). */
  readonly afterLayer?: (index: number, ready?: EventRef) => void;
}

export interface StepHooks extends LayerHooks {
  /**
   * The grammar's mask for this sequence's token, a bit per token, the lowest of the first word is token 0's; undefined: none. Asked
   * for before the step, awaited once its forward pass is under way. Of a rejection the sequence fails alone.
   */
  readonly mask?: (sequence: ScheduledSequence) => Promise<Uint32Array> | Uint32Array | undefined;
  /** The logits that this sequence's token is sampled from, before bans and temperature. Overwritten after the call; costs a copy on a GPU. */
  readonly sampling?: (sequence: ScheduledSequence, logits: Float32Array) => void;
}

export interface Executor {
  /** One paged cache per layer, and its name on the wire: `model.layers.0.self_attn.attn`. */
  readonly layers: readonly { readonly name: string; readonly cache: PagedLayer }[];
  readonly vocabSize: number;
  forward(batch: ForwardBatch, hooks: StepHooks): Promise<ForwardResult>;
  /** Logits of the last token of each sequence, [sequences, vocab], float32: for tests. */
  logits(batch: ForwardBatch): Promise<Float32Array>;
  dispose(): void;
}
