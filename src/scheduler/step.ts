/** One step: what runs, and what its connector is told. */
import type { ScheduledRequest } from '../connector/connector.ts';
import type { ConnectorMetadata } from '../connector/metadata.ts';
import type { BlockCopy } from '../kv/block-manager.ts';
import type { EngineRequestId } from '../wire/ids.ts';
import type { TokenLogprob } from '../wire/token-logprob.ts';
import type { Sequence } from './sequence.ts';
import { type ForwardBatch, type ForwardResult, looksBack, type ScheduledSequence } from './types.ts';

export interface StepEntry {
  readonly sequence: Sequence;
  readonly numTokens: number;
  readonly sampled: boolean;
}

export interface SchedulerStep {
  readonly batch: ForwardBatch;
  /** Absent without a connector. */
  readonly metadata?: ConnectorMetadata;
  readonly preempted: readonly EngineRequestId[];
  readonly entries: readonly StepEntry[];
  readonly numTokens: number;
}

/** Collects a step under its token budget. */
export class StepBuilder {
  budget: number;
  readonly preempted: EngineRequestId[] = [];
  readonly entries: StepEntry[] = [];
  /** Leaders alone: those whose prompt KV a connector may save. */
  readonly scheduled: ScheduledRequest[] = [];
  readonly #sequences: ScheduledSequence[] = [];
  readonly #copies: BlockCopy[] = [];
  readonly #fullBudget: number;

  constructor(budget: number) {
    this.budget = budget;
    this.#fullBudget = budget;
  }

  /** `blocks` covers `numComputed + numTokens` tokens; it is passed on as it is, so it must not change before the step has run. */
  add(sequence: Sequence, numTokens: number, blocks: readonly number[]): void {
    const start = sequence.numComputed;
    const end = start + numTokens;
    const { request } = sequence.group;
    const sampled = end === sequence.length;
    const targets = sequence.needsPromptLogprobs
      ? sequence.tokens(start + 1, Math.max(start + 1, Math.min(end + 1, sequence.promptLength)))
      : undefined;
    this.#sequences.push({
      sequenceId: sequence.id,
      requestId: request.requestId,
      transferId: request.transferId,
      tokens: sequence.tokens(start, end),
      start,
      blockTable: Int32Array.from(blocks),
      ...(sampled && {
        sample: {
          params: request.sampling,
          outputPosition: sequence.numOutput,
          index: sequence.index,
          ...(looksBack(request.sampling) && { history: sequence }),
        },
      }),
      ...(targets && { promptLogprobs: { count: request.sampling.promptLogprobs ?? 0, targets } }),
    });
    if (sequence.copy) this.#copies.push(sequence.copy);
    if (sequence.isLeader) {
      this.scheduled.push({
        ...sequence.transferRequest(),
        numComputedTokens: start,
        numScheduledTokens: numTokens,
        blockIds: blocks,
      });
    }
    this.entries.push({ sequence, numTokens, sampled });
    this.budget -= numTokens;
  }

  build(metadata: ConnectorMetadata | undefined): SchedulerStep {
    return {
      batch: { sequences: this.#sequences, blockCopies: this.#copies },
      ...(metadata && { metadata }),
      preempted: this.preempted,
      entries: this.entries,
      numTokens: this.#fullBudget - this.budget,
    };
  }
}

/**
 * The first token of each request whose prompt ends with this step, by its request. Of the first completion alone, which is the one that
 * the other end of a pair draws likewise.
 */
export function firstTokens({ entries }: SchedulerStep, { sampled }: ForwardResult) {
  const tokens = new Map(sampled.map((token) => [token.sequenceId, token]));
  const first = new Map<EngineRequestId, { tokens: [number]; logprobs?: [TokenLogprob] }>();
  for (const { sequence } of entries) {
    const drawn = tokens.get(sequence.id);
    if (!drawn || sequence.index > 0 || sequence.numOutput > 0) continue;
    const { token, logprob } = drawn;
    first.set(sequence.group.request.requestId, { tokens: [token], ...(logprob && { logprobs: [logprob] }) });
  }
  return first;
}
