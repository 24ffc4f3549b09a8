/** One completion on its way out: tokens become text, text stops at stop strings, and log-probabilities stay beside their tokens. */
import { PdError } from '../../errors.ts';
import type { TextModel } from '../../model/tokenizer.ts';
import { createParser } from '../../parsing/parser.ts';
import type { Part, PartParser } from '../../parsing/parts.ts';
import type { PromptLogprobs } from '../../scheduler/prompt-logprobs.ts';
import type { RequestOutput } from '../../scheduler/types.ts';
import type { TokenLogprob } from '../../wire/token-logprob.ts';
import type { ReadPrompt, SamplingBody, TextOptions } from './fields.ts';

/** A token's log-probabilities and where its text begins in the completion (after the prompt, where that is echoed). */
export interface ChoiceLogprob {
  readonly logprob: TokenLogprob;
  readonly offset: number;
}

/** What has become certain since the last delta. Joined, deltas are the whole completion. */
export interface ChoiceDelta {
  readonly text: string;
  /** What the text says, as far as that is certain; none where it is not parsed. */
  readonly parts: readonly Part[];
  /** Generated since the last delta that had text, the token that ended the completion included. */
  readonly tokens: readonly number[];
  readonly logprobs: readonly ChoiceLogprob[];
  readonly finishReason?: 'stop' | 'length';
  /** The stop string, or the id of the stop token, that ended the completion; absent where its text just ended. */
  readonly stopReason?: string | number;
}

/** Something new about choice `index` = prompt x n + completion. */
export interface ChoiceEvent {
  readonly index: number;
  readonly delta: ChoiceDelta;
  /** With the first event of a choice. */
  readonly start?: { readonly prompt: ReadPrompt; readonly promptLogprobs?: PromptLogprobs };
}

export interface Usage {
  readonly prompt_tokens: number;
  /** Of the prompt: found in the prefix cache. */
  readonly prompt_tokens_details: { readonly cached_tokens: number };
  readonly total_tokens: number;
  readonly completion_tokens: number;
  /** Of the completion: thoughts. Absent where none are told apart. */
  readonly completion_tokens_details?: { readonly reasoning_tokens: number };
}

/** The fields that `return_token_ids` adds to a choice, as vLLM names them. */
export function tokenIdsOf(
  body: Pick<SamplingBody, 'return_token_ids'>,
  events: readonly ChoiceEvent[],
): object {
  return body.return_token_ids ? { token_ids: events.flatMap(({ delta }) => delta.tokens) } : {};
}

/** The same for the prompt. Nothing where `event` is not the first of its choice. */
export function promptTokenIdsOf(
  body: Pick<SamplingBody, 'return_token_ids'>,
  event: ChoiceEvent | undefined,
): object {
  return body.return_token_ids && event?.start ? { prompt_token_ids: [...event.start.prompt.tokens] } : {};
}

/** `finish_reason` of a choice and, with it, `stop_reason`, as vLLM gives it. */
export function endOf(events: readonly ChoiceEvent[]): object {
  const { finishReason = null, stopReason = null } = events.at(-1)?.delta ?? {};
  return { finish_reason: finishReason, ...(finishReason && { stop_reason: stopReason }) };
}

export class Choice {
  readonly #decoder: ReturnType<TextModel['decoder']>;
  readonly #stops: StopMatcher;
  readonly #minTokens: number;
  readonly #includeStop: boolean;
  readonly #eos: number | undefined;
  readonly #parser: PartParser | undefined;
  #parts: Part[] = [];
  #tokens = 0;
  #thoughtTokens = 0;
  /** What was said last is a thought. */
  #thinking: boolean;
  /** Characters decoded so far, those held back included. */
  #decoded: number;
  #pendingTokens: number[] = [];
  #pending: ChoiceLogprob[] = [];
  #finished = false;

  /** `offset`: characters before the completion (an echoed prompt). */
  constructor(
    model: TextModel,
    stops: readonly StopString[],
    minTokens: number,
    offset = 0,
    { includeStop = false, eos, parsing, ...decoding }: TextOptions = {},
  ) {
    this.#decoder = model.decoder(decoding);
    this.#stops = new StopMatcher(stops, includeStop);
    this.#includeStop = includeStop;
    this.#eos = eos;
    this.#parser = parsing && createParser(parsing);
    this.#thinking = parsing?.reasoning?.inside ?? false;
    this.#minTokens = minTokens;
    this.#decoded = offset;
  }

  /** Tokens generated, an end-of-sequence token included. */
  get tokens(): number {
    return this.#tokens;
  }

  /** Of them: those of thoughts. */
  get thoughtTokens(): number {
    return this.#thoughtTokens;
  }

  get finished(): boolean {
    return this.#finished;
  }

  /** True once a stop string or the end of the one call ended the completion, which the core does not know of. */
  get stopped(): boolean {
    return this.#stops.matched !== undefined || this.#parser?.done === true;
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
    let stopToken: number | undefined;
    for (const [i, token] of output.tokens.entries()) {
      // The token that ended the completion (end of sequence, stop_token_ids) is counted but is no text.
      const last = i === output.tokens.length - 1;
      const ending = finishReason === 'stop' && last && !output.grammarEnded;
      if (ending && token !== this.#eos) stopToken = token;
      const logprob = output.logprobs?.[i];
      if (logprob) this.#pending.push({ logprob, offset: this.#decoded });
      this.#pendingTokens.push(token);
      this.#tokens++;
      if (!ending || this.#includeStop) text += this.#emit(this.#decoder.push(token));
      if (this.stopped) return this.#delta(text, 'stop');
    }
    if (finishReason === undefined) return this.#delta(text);
    text += this.#emit(this.#decoder.flush());
    if (!this.stopped) text += this.#say(this.#stops.flush());
    return this.#delta(text, this.stopped ? 'stop' : finishReason, stopToken);
  }

  #emit(text: string): string {
    this.#decoded += text.length;
    // Before min_tokens nothing stops a completion.
    return this.#say(this.#tokens <= this.#minTokens ? text : this.#stops.push(text));
  }

  #say(text: string): string {
    if (this.#parser) this.#parts.push(...this.#parser.push(text));
    return text;
  }

  #delta(text: string, finishReason?: 'stop' | 'length', stopToken?: number): ChoiceDelta {
    if (finishReason !== undefined) {
      this.#finished = true;
      if (this.#parser) this.#parts.push(...this.#parser.flush());
    }
    const stopReason = this.#stops.matched ?? stopToken;
    // Tokens and log-probabilities go out with text, so that none is ahead of what a client can see.
    const take = text !== '' || finishReason !== undefined;
    const tokens = take ? this.#pendingTokens : [];
    const logprobs = take ? this.#pending : [];
    if (take) {
      this.#pendingTokens = [];
      this.#pending = [];
    }
    const parts = this.#parts;
    this.#parts = [];
    const last = parts.at(-1);
    if (last) this.#thinking = last.type === 'reasoning';
    if (this.#thinking) this.#thoughtTokens += tokens.length;
    return {
      text,
      parts,
      tokens,
      logprobs,
      ...(finishReason !== undefined && { finishReason, ...(stopReason !== undefined && { stopReason }) }),
    };
  }
}

/** A stop string, and for each of its beginnings the length of the longest end of it that is a beginning too: where to go on behind a mismatch. */
export interface StopString {
  readonly text: string;
  readonly back: Int32Array;
}

export function stopString(text: string): StopString {
  const stop = { text, back: new Int32Array(text.length) };
  for (let i = 1; i < text.length; i++) stop.back[i] = longer(stop, stop.back[i - 1]!, text.charCodeAt(i));
  return stop;
}

/** Of a stop string: how much of it stands at the end, once `code` follows `length` of it. */
function longer({ text, back }: StopString, length: number, code: number): number {
  let at = length;
  while (at > 0 && text.charCodeAt(at) !== code) at = back[at - 1]!;
  return text.charCodeAt(at) === code ? at + 1 : 0;
}

/**
 * Finds stop strings in text that comes in pieces, looking at each character once. What could still become one is held back, so that no
 * part of a stop string is ever seen outside:
 *
 *   stop "END"    push "the E" -> "the "    push "ND of" -> "", matched    (or push "asy" -> "Easy")
 */
export class StopMatcher {
  readonly #stops: readonly StopString[];
  readonly #include: boolean;
  /** Of each: how much of it stands at the end of the text. */
  readonly #lengths: Int32Array;
  #held = '';
  #matched: string | undefined;

  /** `include`: what stopped the text is part of it. */
  constructor(stops: readonly StopString[], include = false) {
    this.#stops = stops;
    this.#include = include;
    this.#lengths = new Int32Array(stops.length);
  }

  /** The stop string found, the first to end in the text; of several that end there the longest. Nothing comes out after it. */
  get matched(): string | undefined {
    return this.#matched;
  }

  /** Text that is certain to stand before any stop string. */
  push(text: string): string {
    if (this.#matched !== undefined) return '';
    if (this.#stops.length === 0) return text;
    const all = this.#held + text;
    for (let i = 0; i < text.length; i++) {
      const found = this.#take(text.charCodeAt(i));
      if (found === undefined) continue;
      const end = this.#held.length + i + 1;
      this.#held = '';
      this.#matched = found;
      return all.slice(0, this.#include ? end : end - found.length);
    }
    const certain = all.length - Math.max(...this.#lengths);
    this.#held = all.slice(certain);
    return all.slice(0, certain);
  }

  /** The stop string that ends with `code`. */
  #take(code: number): string | undefined {
    let found: string | undefined;
    for (const [i, stop] of this.#stops.entries()) {
      const length = longer(stop, this.#lengths[i]!, code);
      this.#lengths[i] = length;
      if (length === stop.text.length && length > (found?.length ?? 0)) found = stop.text;
    }
    return found;
  }

  /** The text is over: what was held back is no stop string. */
  flush(): string {
    const held = this.#held;
    this.#held = '';
    return held;
  }
}
