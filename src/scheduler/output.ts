/** What a sampled token means for its sequence: does it end, and what is told. */
import { packLogprobs } from './prompt-logprobs.ts';
import type { Sequence } from './sequence.ts';
import type { FinishReason, RequestOutput, SampledToken } from './types.ts';

/** Appends the token to `sequence`. `maxLength`: most tokens a sequence may have, prompt and output. */
export function outputOf(sequence: Sequence, sampled: SampledToken, maxLength: number): RequestOutput {
  const { request } = sequence.group;
  const { sampling } = request;
  const first = !sequence.answered;
  const ofPrompt = first && sequence.isLeader;
  const withPromptLogprobs = sequence.needsPromptLogprobs;
  // maxTokens 0 asks for the prompt alone (echo with logprobs).
  const tokens = sampling.maxTokens > 0 ? [sampled.token] : [];
  for (const token of tokens) sequence.append(token);
  sequence.answered = true;
  const finishReason = finishReasonOf(sequence, sampled.token, maxLength);
  return {
    requestId: request.requestId,
    index: sequence.index,
    tokens,
    ...(sampling.logprobs !== undefined &&
      sampled.logprob && { logprobs: tokens.length > 0 ? [sampled.logprob] : [] }),
    ...(withPromptLogprobs && { promptLogprobs: packLogprobs(sequence.promptLogprobs) }),
    ...(finishReason && { finishReason }),
    ...(ofPrompt && { promptSource: promptSourceOf(sequence) }),
  };
}

/** `token` has been appended. */
function finishReasonOf(sequence: Sequence, token: number, maxLength: number): FinishReason | undefined {
  const { maxTokens, minTokens, stopTokenIds } = sequence.group.request.sampling;
  // The token at output position p (from 0) may stop once p tokens came before it and p >= minTokens.
  if (sequence.numOutput > minTokens && stopTokenIds.includes(token)) return 'stop';
  if (sequence.numOutput >= maxTokens || sequence.length >= maxLength) return 'length';
  return undefined;
}

function promptSourceOf(sequence: Sequence): NonNullable<RequestOutput['promptSource']> {
  const { promptLength, numLoaded: loaded, numCached: cached } = sequence;
  return { computed: promptLength - loaded - cached, loaded, cached };
}
