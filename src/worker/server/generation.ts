/** Prompts of one HTTP request through the core: n completions of each, merged into one stream of events. */
import { randomBytes, randomInt } from 'node:crypto';
import { setMaxListeners } from 'node:events';
import { type ErrorData, PdError } from '../../errors.ts';
import type { PromptLogprobs } from '../../scheduler/prompt-logprobs.ts';
import { sharedSeed } from '../../scheduler/sampling-digest.ts';
import type { RequestOutput } from '../../scheduler/types.ts';
import { engineRequestId, kvKeyOf } from '../../wire/ids.ts';
import type { Wire } from '../../wire/overlap.ts';
import { AsyncQueue } from '../async-queue.ts';
import {
  Choice,
  type ChoiceDelta,
  type ChoiceEvent,
  type StopString,
  stopString,
  type Usage,
} from './choice.ts';
import type { ServerContext } from './context.ts';
import { type Asked, badField } from './fields.ts';
import { turns } from './turns.ts';

/** This many reach the core together. */
const PROMPTS_AT_ONCE = 16;

export interface Plan extends Asked {
  /** Of the answer. */
  readonly id: string;
  /** Of each prompt: what producer and consumer agree on. */
  readonly serverIds: readonly string[];
  /** On a consumer: its producer may still compute the prompts for so long. */
  readonly prefillWithinMs?: number;
  /** How their KV travels; absent: frozen. */
  readonly wire?: Wire;
}

/** One run of a plan. Iterate once; `usage` is right when the iteration has ended. */
export class GenerationRun {
  readonly #context: ServerContext;
  readonly #plan: Plan;
  readonly #stops: readonly StopString[];
  readonly #choices: Choice[] = [];
  readonly #abort = new AbortController();
  /** Of a request that names none and is this worker's alone. */
  readonly #seed = randomInt(2 ** 31);
  #kvFailure: ErrorData | undefined;
  #cachedTokens = 0;

  constructor(context: ServerContext, plan: Plan) {
    const { maxNumSeqs } = context.config;
    if (plan.n > maxNumSeqs)
      throw badField('n', `${plan.n} is more than this worker's batch of ${maxNumSeqs}`);
    this.#context = context;
    this.#plan = plan;
    this.#stops = plan.stops.map(stopString);
  }

  /** On a producer, once the iteration has ended: why KV of a prompt will not come to its consumer. */
  get kvFailure(): ErrorData | undefined {
    return this.#kvFailure;
  }

  get usage(): Usage {
    const { prompts, maxTokens, text } = this.#plan;
    const prompt = prompts.reduce((sum, { tokens }) => sum + tokens.length, 0);
    const completion = maxTokens === 0 ? 0 : this.#choices.reduce((sum, choice) => sum + choice.tokens, 0);
    const thoughts = this.#choices.reduce((sum, { thoughtTokens }) => sum + thoughtTokens, 0);
    return {
      prompt_tokens: prompt,
      total_tokens: prompt + completion,
      completion_tokens: completion,
      prompt_tokens_details: { cached_tokens: this.#cachedTokens },
      ...(text.parsing && { completion_tokens_details: { reasoning_tokens: thoughts } }),
    };
  }

  /** Throws the first error of any prompt; the others are aborted then, as they are when `signal` fires or the loop is left. */
  async *events(signal: AbortSignal): AsyncGenerator<ChoiceEvent> {
    const all = AbortSignal.any([signal, this.#abort.signal]);
    setMaxListeners(0, all); // one a prompt
    const merged = new AsyncQueue<ChoiceEvent>();
    const fail = (error: unknown) => {
      this.#abort.abort();
      merged.fail(error);
    };
    const pumps: Promise<void>[] = [];
    const begin = (at: number) => pumps.push(this.#pump(at, merged, all).catch(fail));
    const ended = this.#start(begin, all)
      .catch(fail)
      .then(() => Promise.all(pumps));
    void ended.then(() => merged.end());
    try {
      yield* merged;
    } finally {
      this.#abort.abort();
      await ended;
    }
  }

  /** A thousand prompts with all their completions take their time. */
  async #start(begin: (at: number) => void, signal: AbortSignal): Promise<void> {
    const turn = turns();
    for (const [at, serverId] of this.#plan.serverIds.entries()) {
      if (signal.aborted) throw new PdError('REQUEST_ABORTED', `request ${serverId} was aborted`);
      begin(at);
      if ((at + 1) % PROMPTS_AT_ONCE === 0) await turn();
    }
  }

  async #pump(at: number, out: AsyncQueue<ChoiceEvent>, signal: AbortSignal): Promise<void> {
    const { core, metrics, config, model, inFlight, log } = this.#context;
    const { id, n, sampling, echo, maxTokens, prefillWithinMs, text, priority, wire, grammarParam } =
      this.#plan;
    const prompt = this.#plan.prompts[at]!;
    const serverId = this.#plan.serverIds[at]!;
    const offset = echo ? prompt.text.length : 0;
    const choices = Array.from(
      { length: n },
      () => new Choice(model, this.#stops, sampling.minTokens, offset, text),
    );
    this.#choices.push(...choices);
    const room = core.info.maxModelLen - prompt.tokens.length;
    const suffix = config.randomizeRequestIds ? randomBytes(4).toString('hex') : undefined;
    const requestId = engineRequestId(serverId, suffix);
    const transferId = kvKeyOf({ serverId, requestId }, config.transfer.kvKey);
    const seed = sampling.seed ?? (wire === 'native' ? sharedSeed(transferId) : this.#seed);
    const generation = core.generate(
      {
        requestId,
        transferId,
        promptTokens: prompt.tokens,
        sampling: { ...sampling, seed, maxTokens: Math.max(Math.min(maxTokens ?? room, room), 1) },
        n,
        priority,
        ...(prefillWithinMs !== undefined && { prefillWithinMs }),
        ...(wire && { wire }),
      },
      signal,
    );
    if (at === 0) inFlight.timelines.stamp(id, 'submitted');
    log.debug({ requestId, promptTokens: prompt.tokens.length, n, maxTokens }, 'request handed to the core');
    const began = performance.now();
    const last: (number | undefined)[] = [];
    const started = new Set<number>();
    let promptLogprobs: PromptLogprobs | undefined;
    const forget = inFlight.know(serverId, transferId);
    try {
      for await (const output of generation) {
        if (at === 0 && started.size === 0) inFlight.timelines.stamp(id, 'heard');
        const choice = choices[output.index];
        if (!choice || choice.finished) continue;
        promptLogprobs ??= output.promptLogprobs;
        this.#cachedTokens += output.promptSource?.cached ?? 0;
        this.#observe(output, began, last);
        const delta = withoutScored(choice.push(namingGrammar(output, grammarParam)), maxTokens);
        if (choice.stopped) generation.abort(output.index);
        const first = !started.has(output.index);
        started.add(output.index);
        out.push({
          index: at * n + output.index,
          delta,
          ...(first && { start: { prompt, ...(promptLogprobs && { promptLogprobs }) } }),
        });
      }
      // Whoever asked only for the prompt can tell the consumer, which would otherwise wait for its deadline.
      this.#kvFailure ??= await unless(signal, generation.kvSaved());
    } finally {
      forget();
    }
    const seconds = (performance.now() - began) / 1_000;
    metrics.observe('vllm:e2e_request_latency_seconds', seconds);
    const tokens = choices.reduce((sum, choice) => sum + choice.tokens, 0);
    log.debug({ requestId, tokens, seconds }, 'request done');
  }

  #observe(output: RequestOutput, began: number, last: (number | undefined)[]): void {
    if (output.tokens.length === 0) return;
    const { metrics } = this.#context;
    const now = performance.now();
    const previous = last[output.index];
    if (previous !== undefined) {
      const each = (now - previous) / 1_000 / output.tokens.length;
      for (const _ of output.tokens) metrics.observe('vllm:inter_token_latency_seconds', each);
    } else if (output.index === 0) {
      metrics.observe('vllm:time_to_first_token_seconds', (now - began) / 1_000);
    }
    last[output.index] = now;
  }
}

/** The core does not know which field a grammar came from. */
function namingGrammar(output: RequestOutput, param: string | undefined): RequestOutput {
  const { error } = output;
  if (!error?.context.grammar || param === undefined) return output;
  const { code, message } = badField(param, error.message);
  return { ...output, error: { ...error, code, message, context: { ...error.context, param } } };
}

/** With `max_tokens: 0` the core still generates one token, as it knows no request for none; it is left out. */
function withoutScored(delta: ChoiceDelta, maxTokens: number | undefined): ChoiceDelta {
  return maxTokens === 0 ? { text: '', parts: [], tokens: [], logprobs: [], finishReason: 'length' } : delta;
}

/** Undefined once the signal has fired: nobody is waiting for it any more. */
function unless<T>(signal: AbortSignal, promise: Promise<T>): Promise<T | undefined> {
  if (signal.aborted) return Promise.resolve(undefined);
  return new Promise((resolve) => {
    const stop = () => resolve(undefined);
    signal.addEventListener('abort', stop, { once: true });
    void promise.then((value) => {
      signal.removeEventListener('abort', stop);
      resolve(value);
    });
  });
}
