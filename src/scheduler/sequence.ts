/** One completion on its way, the request it belongs to, and what is told of it. State of the scheduler; which runs is decided elsewhere. */
import type { ConnectorRequest } from '../connector/connector.ts';
import type { ErrorData } from '../errors.ts';
import { type BlockHash, extendHashes } from '../kv/block-hash.ts';
import type { BlockCopy } from '../kv/block-manager.ts';
import type { TokenLogprob } from '../wire/token-logprob.ts';
import { packLogprobs } from './prompt-logprobs.ts';
import { samplingDigest } from './sampling-digest.ts';
import type { CoreRequest, FinishReason, RequestOutput, SampledToken } from './types.ts';

/**
 *   following --(leader's prompt there: fork, or no block free)--> ready | waiting
 *   waiting ----(blocks)----> running | loading         loading --(KV there, or to be computed)--> ready
 *   ready ------(slot)------> running                   ready, running --(preempted)--> waiting
 *
 * Blocks are held in `loading`, `ready` and `running`.
 */
export type SequenceState = 'following' | 'waiting' | 'loading' | 'ready' | 'running' | 'finished';

export interface RequestGroup {
  readonly request: CoreRequest;
  /** Rank in order of arrival. */
  readonly arrival: number;
  readonly sequences: Sequence[];
  /** Computes or loads the prompt; the others fork after it. */
  leader: Sequence;
  /** Sequences that have not ended. */
  live: number;
  /** The leader's load is under way: its blocks may be written at any moment. */
  loading: boolean;
  /** Its client went away, no token of it could be drawn, or the pair was told that nobody comes for its KV. */
  aborted: boolean;
  /** The producer is known to be done with the prompt. */
  prefilled: boolean;
}

export class Sequence {
  readonly id: string;
  readonly index: number;
  readonly group: RequestGroup;
  readonly promptLength: number;
  state: SequenceState = 'waiting';
  /** Tokens whose KV is in this sequence's blocks. */
  numComputed = 0;
  /** Of those, prompt tokens that came from the prefix cache, and from the peer, at the last admission. */
  numCached = 0;
  numLoaded = 0;
  /** First output token has been told. */
  answered = false;
  /** Ended for its client while its load goes on, for the sake of those that follow. */
  silent = false;
  /** The partial block of a fork, to be copied before its first step. */
  copy: BlockCopy | undefined;
  promptLogprobs: TokenLogprob[] = [];
  #tokens: Int32Array;
  #length: number;
  readonly #hashes: BlockHash[] = [];
  #samplingDigest: string | undefined;

  constructor(group: RequestGroup, index: number) {
    const { request } = group;
    this.group = group;
    this.index = index;
    this.id = request.n === 1 ? request.requestId : `${request.requestId}/${index}`;
    this.promptLength = request.promptTokens.length;
    this.#tokens = request.promptTokens;
    this.#length = this.promptLength;
  }

  /** Known tokens: prompt and output. */
  get length(): number {
    return this.#length;
  }

  get numOutput(): number {
    return this.#length - this.promptLength;
  }

  /** Tokens that are known and not computed. */
  get numRemaining(): number {
    return this.#length - this.numComputed;
  }

  get isLeader(): boolean {
    return this.group.leader === this;
  }

  /** The prompt's own log-probabilities are asked for and not told yet: every prompt token must be computed. */
  get needsPromptLogprobs(): boolean {
    return this.isLeader && !this.answered && this.group.request.sampling.promptLogprobs !== undefined;
  }

  tokens(start: number, end: number): Int32Array {
    return this.#tokens.slice(start, end);
  }

  append(token: number): void {
    if (this.#length === this.#tokens.length) {
      const grown = new Int32Array(Math.max(16, this.#length * 2));
      grown.set(this.#tokens.subarray(0, this.#length));
      this.#tokens = grown;
    }
    this.#tokens[this.#length++] = token;
  }

  /** Keys of all full blocks of the known tokens. */
  hashes(blockSize: number): readonly BlockHash[] {
    extendHashes(this.#hashes, this.#tokens.subarray(0, this.#length), blockSize);
    return this.#hashes;
  }

  /** Its request as a connector sees it. */
  connectorRequest(): ConnectorRequest {
    const { sampling, prefillWithinMs } = this.group.request;
    return {
      ...this.transferRequest(),
      mayLoad: sampling.promptLogprobs === undefined && this.numOutput === 0,
      ...(prefillWithinMs !== undefined && !this.group.prefilled && { prefillWithinMs }),
    };
  }

  /** What a connector is told with every step of it. */
  transferRequest() {
    const { requestId, transferId, promptTokens, sampling, wire } = this.group.request;
    if (wire) this.#samplingDigest ??= samplingDigest(sampling);
    return {
      requestId,
      transferId,
      numPromptTokens: this.promptLength,
      promptTokens,
      ...(wire && this.#samplingDigest && { wire, samplingDigest: this.#samplingDigest }),
    };
  }

  /** Its blocks are gone: everything must be computed again. */
  resetProgress(): void {
    this.numComputed = 0;
    this.numCached = 0;
    this.numLoaded = 0;
    this.promptLogprobs = [];
  }
}

/**
 * Appends the token to `sequence`; what is told of it, and whether it ends there. `maxLength`: most tokens a sequence may have, prompt and
 * output; `isLast`: under its grammar nothing can follow the token.
 */
export function sampledOutput(
  sequence: Sequence,
  sampled: SampledToken,
  maxLength: number,
  isLast: boolean,
): RequestOutput {
  const { request } = sequence.group;
  const { sampling } = request;
  const first = !sequence.answered;
  const ofPrompt = first && sequence.isLeader;
  const withPromptLogprobs = sequence.needsPromptLogprobs;
  // maxTokens 0 asks for the prompt alone (echo with logprobs).
  const tokens = sampling.maxTokens > 0 ? [sampled.token] : [];
  for (const token of tokens) sequence.append(token);
  sequence.answered = true;
  const stopReason = finishReasonOf(sequence, sampled.token, maxLength);
  const grammarEnded = isLast && stopReason !== 'stop';
  const finishReason = grammarEnded ? 'stop' : stopReason;
  return {
    requestId: request.requestId,
    index: sequence.index,
    tokens,
    ...(sampling.logprobs !== undefined &&
      sampled.logprob && { logprobs: tokens.length > 0 ? [sampled.logprob] : [] }),
    ...(withPromptLogprobs && { promptLogprobs: packLogprobs(sequence.promptLogprobs) }),
    ...(finishReason && { finishReason }),
    ...(grammarEnded && { grammarEnded }),
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

/** The last output of a sequence that ends without new tokens. */
export function endOutput(sequence: Sequence, finishReason: FinishReason, error?: ErrorData): RequestOutput {
  return {
    requestId: sequence.group.request.requestId,
    index: sequence.index,
    tokens: [],
    finishReason,
    ...(error && { error }),
  };
}

/** Lower priorities first, then earlier arrivals; within a request, lower indexes. */
export function byTurn(a: Sequence, b: Sequence): number {
  const [first, second] = [a.group, b.group];
  const priority = (first.request.priority ?? 0) - (second.request.priority ?? 0);
  return priority || first.arrival - second.arrival || a.index - b.index;
}

/** Sequences in the order of `byTurn`. */
export class SequenceQueue implements Iterable<Sequence> {
  readonly #items: Sequence[] = [];

  get length(): number {
    return this.#items.length;
  }

  at(index: number): Sequence | undefined {
    return this.#items[index];
  }

  get last(): Sequence | undefined {
    return this.#items.at(-1);
  }

  [Symbol.iterator](): Iterator<Sequence> {
    return this.#items[Symbol.iterator]();
  }

  insert(sequence: Sequence): void {
    let low = 0;
    let high = this.#items.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (byTurn(this.#items[middle]!, sequence) < 0) low = middle + 1;
      else high = middle;
    }
    this.#items.splice(low, 0, sequence);
  }

  /** Does nothing where it is not in the queue. */
  remove(sequence: Sequence): void {
    const index = this.#items.indexOf(sequence);
    if (index >= 0) this.#items.splice(index, 1);
  }
}
