/** The digest by which two ends know that they draw a prompt's first token alike (docs/protocol.md, "Native hand-over"). Pure. */
import { hash } from 'node:crypto';
import type { TransferId } from '../wire/ids.ts';
import type { SamplingParams } from './types.ts';

/**
 * The part of each parameter that the first token and its log-probabilities depend on; undefined: none. A parameter that is added must have its
 * row here, or the two ends could draw with different ones unnoticed.
 */
const PARTS: {
  readonly [Name in keyof Required<SamplingParams>]: (params: SamplingParams) => unknown;
} = {
  temperature: ({ temperature }) => temperature,
  // Greedy draws nothing, so what would shape the draw differs without meaning anything: a seed that each end made up, above all.
  topP: (params) => (isGreedy(params) || params.topP >= 1 ? undefined : params.topP),
  topK: (params) => (isGreedy(params) || params.topK === 0 ? undefined : params.topK),
  seed: (params) => (isGreedy(params) ? undefined : params.seed),
  // The first token stands at position 0: whether it may stop at all, not for how long it may not.
  minTokens: ({ minTokens }) => (minTokens > 0 ? true : undefined),
  stopTokenIds: ({ minTokens, stopTokenIds }) => (minTokens > 0 ? ascending(stopTokenIds) : undefined),
  minP: (params) => (isGreedy(params) ? undefined : params.minP || undefined),
  // Both count what the output has, and before the first token that is nothing.
  presencePenalty: () => undefined,
  frequencyPenalty: () => undefined,
  repetitionPenalty: ({ repetitionPenalty = 1 }) => (repetitionPenalty === 1 ? undefined : repetitionPenalty),
  logitBias: ({ logitBias = [] }) =>
    logitBias.length > 0 ? [...logitBias].sort(([a], [b]) => a - b) : undefined,
  allowedTokenIds: ({ allowedTokenIds }) => allowedTokenIds && ascending(allowedTokenIds),
  // Of longer ones something must have come before.
  badWords: ({ badWords = [] }) => {
    const tokens = badWords.flatMap((word) => (word.length === 1 ? word : []));
    return tokens.length > 0 ? ascending(tokens) : undefined;
  },
  grammar: ({ grammar }) => grammar?.key,
  logprobs: ({ logprobs }) => logprobs,
  // A prompt whose own log-probabilities are asked for is never loaded.
  promptLogprobs: () => undefined,
  // The copy that a producer gets ends after one token; when a completion ends is its consumer's business.
  maxTokens: () => undefined,
};

const NAMES = Object.keys(PARTS).sort() as readonly (keyof SamplingParams)[];

/** 128 bits of SHA-256, in hex, equal where the same logits give the same first token and the same log-probabilities of it. */
export function samplingDigest(params: SamplingParams): string {
  const parts = NAMES.flatMap((name) => {
    const part = PARTS[name](params);
    return part === undefined ? [] : [[name, part]];
  });
  return hash('sha256', JSON.stringify(parts), 'hex').slice(0, 32);
}

/** The seed of a request that names none, where both ends of a pair draw its first token: 31 bits of the id that they share. */
export function sharedSeed(transferId: TransferId): number {
  return Number.parseInt(hash('sha256', `seed of ${transferId}`, 'hex').slice(0, 8), 16) >>> 1;
}

function ascending(ids: readonly number[]): readonly number[] {
  return [...new Set(ids)].sort((a, b) => a - b);
}

function isGreedy({ temperature }: SamplingParams): boolean {
  return temperature === 0;
}
