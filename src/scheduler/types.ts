/** Requests as the scheduler sees them, and what one step is. Plain data, no I/O. */
import type { ErrorData } from '../errors.ts';
import type { CompiledGrammar } from '../grammar/compile.ts';
import type { PartsAhead } from '../grammar/mask-parts.ts';
import type { VocabularyData } from '../grammar/vocabulary.ts';
import type { BlockHash } from '../kv/block-hash.ts';
import type { EngineRequestId, TransferId } from '../wire/ids.ts';
import type { Wire } from '../wire/overlap.ts';
import type { TokenLogprob } from '../wire/token-logprob.ts';
import type { PromptLogprobs } from './prompt-logprobs.ts';

export interface SamplingParams {
  /** 0 is greedy. */
  readonly temperature: number;
  readonly topP: number;
  /** 0: all. */
  readonly topK: number;
  /** With a seed, the same prompt gives the same text on any instance; random numbers depend on (seed, output position) only. */
  readonly seed: number;
  readonly maxTokens: number;
  /** Before this many tokens no stop token is sampled. */
  readonly minTokens: number;
  /** End-of-sequence tokens of the model, and `stop_token_ids`. Empty under `ignore_eos`. */
  readonly stopTokenIds: readonly number[];
  /** Alternatives to report per token, or undefined for none; 0 reports the sampled token's logprob alone. */
  readonly logprobs?: number;
  /** As `logprobs`, for the prompt (echo). The prompt is then computed here, never loaded or taken from the prefix cache. */
  readonly promptLogprobs?: number;
  /** Tokens less likely than this share of the likeliest are left out, after temperature. 0 to 1; absent or 0: none. */
  readonly minP?: number;
  /** Taken from the logit of every token that the output has; absent: 0. */
  readonly presencePenalty?: number;
  /** Taken from a token's logit once for each time that the output has it; absent: 0. */
  readonly frequencyPenalty?: number;
  /** Divides the logit of every token of prompt and output where it is above 0, multiplies it where below; absent: 1. */
  readonly repetitionPenalty?: number;
  /** Token id and what is added to its logit. */
  readonly logitBias?: readonly (readonly [token: number, bias: number])[];
  /** Only these may be drawn; absent: all. */
  readonly allowedTokenIds?: readonly number[];
  /** Token sequences that the output may not have: the last token of one is banned where the output ends in those before it. */
  readonly badWords?: readonly (readonly number[])[];
  /** The output is a text of this grammar; it ends where nothing can follow. */
  readonly grammar?: GrammarUse;
}

export interface GrammarUse {
  /** Equal where the grammars are. */
  readonly key: string;
  readonly tables: CompiledGrammar;
  /** What its masks begin with, so that steps need not wait until it is found. */
  readonly ahead: PartsAhead;
  /** Of the served model, the same for all of its requests. */
  readonly vocabulary: VocabularyData;
}

export interface CoreRequest {
  readonly requestId: EngineRequestId;
  /** What its KV is known by at both ends of a pair. */
  readonly transferId: TransferId;
  readonly promptTokens: Int32Array;
  readonly sampling: SamplingParams;
  /** Completions of this prompt. The first computes (or loads) the prompt, the others fork its blocks. */
  readonly n: number;
  /** Lower ones go first. Absent: 0. */
  readonly priority?: number;
  /** On a consumer: the producer may still compute the prompt for so long. Absent: its KV is on its way. */
  readonly prefillWithinMs?: number;
  /** How its KV travels, as both ends were told. Absent: frozen. */
  readonly wire?: Wire;
}

export type FinishReason = 'stop' | 'length' | 'abort' | 'error';

/** New tokens of one completion, once a step. */
export interface RequestOutput {
  readonly requestId: EngineRequestId;
  /** Which of the `n` completions. */
  readonly index: number;
  /** A stop token that ended the completion comes last. */
  readonly tokens: readonly number[];
  /** What ended the completion is its grammar, so that the last token is part of the text. */
  readonly grammarEnded?: boolean;
  /** Same length as `tokens` where asked for. */
  readonly logprobs?: readonly TokenLogprob[];
  /** With the first output of index 0. */
  readonly promptLogprobs?: PromptLogprobs;
  readonly finishReason?: FinishReason;
  readonly error?: ErrorData;
  /** On a producer, with the output of the step that ended the prompt: KV that has not got under way to its consumer. */
  readonly kvSave?:
    | { readonly state: 'failed'; readonly error: ErrorData }
    /** It will be told (worker/core-messages.ts, `kv-saved`). */
    | { readonly state: 'opening' };
  /** With the first output: prompt tokens that were not computed here, by where they came from. */
  readonly promptSource?: { readonly computed: number; readonly loaded: number; readonly cached: number };
}

/** The known tokens of one completion, prompt and output. One object for as long as it lives: what is counted of it is kept by it. */
export interface TokenHistory {
  readonly promptLength: number;
  readonly length: number;
  tokens(start: number, end: number): Int32Array;
}

/** What later prompts can find in the prefix cache from now on, or no longer. */
export type CacheChange =
  | {
      readonly type: 'stored';
      readonly hashes: readonly BlockHash[];
      /** Of the block before the first; absent at the start of a sequence. */
      readonly parent?: BlockHash;
      /** Of all its blocks. */
      readonly tokens: Int32Array;
    }
  | { readonly type: 'removed'; readonly hash: BlockHash };

/** How one completion's token is to be sampled in this step. */
export interface SampleSpec {
  readonly params: SamplingParams;
  /** 0 for the first generated token: the position that seeds the random number, and that `minTokens` counts. */
  readonly outputPosition: number;
  /** Which of n: its random numbers differ. */
  readonly index: number;
  /** Present where `params` look back (`looksBack`). */
  readonly history?: TokenHistory;
}

/** One sequence's share of a step. */
export interface ScheduledSequence {
  /** Unique per sequence: the request id, and the index where n > 1. */
  readonly sequenceId: string;
  readonly requestId: EngineRequestId;
  readonly transferId: TransferId;
  /** Tokens computed in this step; their positions are `start`, `start + 1`, ... */
  readonly tokens: Int32Array;
  readonly start: number;
  readonly blockTable: Int32Array;
  /** Present where this step reaches the end of what is known, so that a token is sampled. */
  readonly sample?: SampleSpec;
  /** Log-probabilities of the prompt tokens after each of `tokens` (within the prompt), this many alternatives each. */
  readonly promptLogprobs?: { readonly count: number; readonly targets: Int32Array };
}

/** Whether the draw depends on the tokens before it. */
export function looksBack(params: SamplingParams): boolean {
  return (
    penalizes(params) ||
    params.grammar !== undefined ||
    (params.badWords ?? []).some(({ length }) => length > 1)
  );
}

export function penalizes({
  repetitionPenalty = 1,
  presencePenalty = 0,
  frequencyPenalty = 0,
}: SamplingParams): boolean {
  return repetitionPenalty !== 1 || presencePenalty !== 0 || frequencyPenalty !== 0;
}

/** What an executor runs. Copies happen before the forward pass. */
export interface ForwardBatch {
  readonly sequences: readonly ScheduledSequence[];
  readonly blockCopies: readonly { readonly source: number; readonly target: number }[];
}

export interface SampledToken {
  readonly sequenceId: string;
  readonly token: number;
  readonly logprob?: TokenLogprob;
}

export interface ForwardResult {
  /** One per sequence that had a `sample` and has not failed, in batch order. */
  readonly sampled: readonly SampledToken[];
  /** By sequence: why no token could be drawn. What its request asks for leaves none; the step and all others are well. */
  readonly failed?: ReadonlyMap<string, ErrorData>;
  /** By sequence, for those that asked. */
  readonly promptLogprobs: ReadonlyMap<string, readonly TokenLogprob[]>;
}
