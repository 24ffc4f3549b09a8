/** One completion on its way out: tokens become text, text stops at stop strings, and log-probabilities stay beside their tokens. */
import { PdError } from '../../errors.ts';
import type { RequestOutput, TokenLogprob } from '../../scheduler/types.ts';
import { StopMatcher } from './stop-matcher.ts';
import type { TextDecoder, TextModel } from './text.ts';

/** A token's log-probabilities and where its text begins in the completion (after the prompt, where that is echoed). */
export interface ChoiceLogprob {
  readonly logprob: TokenLogprob;
  readonly offset: number;
}

/** What has become certain since the last delta. Joined, deltas are the whole completion. */
export interface ChoiceDelta {
  readonly text: string;
  /** Generated since the last delta that had text, the token that ended the completion included. */
  readonly tokens: readonly number[];
  readonly logprobs: readonly ChoiceLogprob[];
  readonly finishReason?: 'stop' | 'length';
}

export class Choice {
  readonly #decoder: TextDecoder;
  readonly #stops: StopMatcher;
  readonly #minTokens: number;
  #tokens = 0;
  /** Characters decoded so far, those held back included. */
  #decoded: number;
  #pendingTokens: number[] = [];
  #pending: ChoiceLogprob[] = [];
  #finished = false;

  /** `offset`: characters before the completion (an echoed prompt). */
  constructor(model: TextModel, stops: readonly string[], minTokens: number, offset = 0) {
    this.#decoder = model.decoder();
    this.#stops = new StopMatcher(stops);
    this.#minTokens = minTokens;
    this.#decoded = offset;
  }

  /** Tokens generated, an end-of-sequence token included. */
  get tokens(): number {
    return this.#tokens;
  }

  get finished(): boolean {
    return this.#finished;
  }

  /** True once a stop string ended the completion, which the core does not know of. */
  get stopped(): boolean {
    return this.#stops.matched !== undefined;
  }

  /** Throws the output's error, or REQUEST_ABORTED where the core gave the completion up. */
  push(output: RequestOutput): ChoiceDelta {
    const { requestId, finishReason } = output;
    if (output.error) throw PdError.fromData(output.error);
    if (finishReason === 'error') throw new PdError('INTERNAL', `request ${requestId} failed`, { requestId });
    if (finishReason === 'abort') {
      throw new PdError('REQUEST_ABORTED', `request ${requestId} was given up by the worker`, { requestId });
    }
    let text = '';
    for (const [i, token] of output.tokens.entries()) {
      // The token that ended the completion (end of sequence, stop_token_ids) is counted but is no text.
      const ending = finishReason === 'stop' && i === output.tokens.length - 1;
      const logprob = output.logprobs?.[i];
      if (logprob) this.#pending.push({ logprob, offset: this.#decoded });
      this.#pendingTokens.push(token);
      this.#tokens++;
      if (!ending) text += this.#emit(this.#decoder.push(token));
      if (this.stopped) return this.#delta(text, 'stop');
    }
    if (finishReason === undefined) return this.#delta(text);
    text += this.#emit(this.#decoder.flush());
    if (!this.stopped) text += this.#stops.flush();
    return this.#delta(text, this.stopped ? 'stop' : finishReason);
  }

  #emit(text: string): string {
    this.#decoded += text.length;
    // Before min_tokens nothing stops a completion.
    return this.#tokens <= this.#minTokens ? text : this.#stops.push(text);
  }

  #delta(text: string, finishReason?: 'stop' | 'length'): ChoiceDelta {
    if (finishReason !== undefined) this.#finished = true;
    // Tokens and log-probabilities go out with text, so that none is ahead of what a client can see.
    const take = text !== '' || finishReason !== undefined;
    const tokens = take ? this.#pendingTokens : [];
    const logprobs = take ? this.#pending : [];
    if (take) {
      this.#pendingTokens = [];
      this.#pending = [];
    }
    return { text, tokens, logprobs, ...(finishReason === undefined ? {} : { finishReason }) };
  }
}
