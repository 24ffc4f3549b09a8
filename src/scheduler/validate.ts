/** What a scheduler refuses at the door. */
import { PdError } from '../errors.ts';
import type { CoreRequest } from './types.ts';

export interface SequenceLimits {
  readonly numBlocks: number;
  /** Tokens per block. */
  readonly blockSize: number;
  /** Most tokens of one sequence, prompt and output. */
  readonly maxModelLen: number;
}

/** Most tokens a sequence may have: one that could outgrow all blocks would preempt itself for ever. */
export function maxSequenceLength({ numBlocks, blockSize, maxModelLen }: SequenceLimits): number {
  return Math.min(maxModelLen, numBlocks * blockSize);
}

/** Throws REQUEST_INVALID, or CONTEXT_EXCEEDED where the prompt and one token can never fit. */
export function validateRequest(request: CoreRequest, limits: SequenceLimits): void {
  const { requestId, promptTokens, n } = request;
  const invalid = (what: string) =>
    new PdError('REQUEST_INVALID', `request ${requestId} ${what}`, { requestId });
  if (promptTokens.length === 0) throw invalid('has an empty prompt');
  if (!Number.isSafeInteger(n) || n < 1) throw invalid(`asks for ${n} completions`);
  if (promptTokens.length < maxSequenceLength(limits)) return;
  throw new PdError(
    'CONTEXT_EXCEEDED',
    `the prompt has ${promptTokens.length} tokens; with at least one more it must fit the context of ` +
      `${limits.maxModelLen} and the KV cache of ${limits.numBlocks} blocks of ${limits.blockSize}`,
    { requestId },
  );
}
