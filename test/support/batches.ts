/** Steps for executors, by hand. */
import type { Executor } from '../../src/model/executor.ts';
import { GREEDY } from '../../src/model/sampler.ts';
import type { ForwardBatch, SamplingParams, ScheduledSequence } from '../../src/scheduler/types.ts';
import { engineRequestId } from '../../src/wire/ids.ts';
import { transferOf } from '../../support/ids.ts';

export interface SequenceOptions {
  readonly id?: string;
  readonly tokens: readonly number[];
  readonly start?: number;
  readonly blocks: readonly number[];
  /** Output position of the token to sample; absent: none is. */
  readonly position?: number;
  readonly params?: SamplingParams;
}

export function sequenceOf({
  id = 'a',
  tokens,
  start = 0,
  blocks,
  position,
  params = GREEDY,
}: SequenceOptions): ScheduledSequence {
  return {
    sequenceId: id,
    requestId: engineRequestId(id),
    transferId: transferOf(id),
    tokens: Int32Array.from(tokens),
    start,
    blockTable: Int32Array.from(blocks),
    ...(position !== undefined && { sample: { params, outputPosition: position, index: 0 } }),
  };
}

export function batchOf(...sequences: ScheduledSequence[]): ForwardBatch {
  return { sequences, blockCopies: [] };
}

/** `count` greedy tokens after `prompt`, computed in chunks of `chunk`, over `blocks`. */
export async function generate(
  executor: Executor,
  prompt: readonly number[],
  count: number,
  {
    blocks,
    chunk = prompt.length,
    id = 'a',
  }: { readonly blocks: readonly number[]; readonly chunk?: number; readonly id?: string },
): Promise<number[]> {
  const known = [...prompt];
  let computed = 0;
  while (known.length < prompt.length + count) {
    const tokens = known.slice(computed, computed + chunk);
    const last = computed + tokens.length === known.length;
    const step = sequenceOf({
      id,
      tokens,
      start: computed,
      blocks,
      ...(last && { position: known.length - prompt.length }),
    });
    const { sampled } = await executor.forward(batchOf(step), {});
    computed += tokens.length;
    if (last) known.push(sampled[0]!.token);
  }
  return known.slice(prompt.length);
}
