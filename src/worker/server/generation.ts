/** Prompts of one HTTP request through the core: n completions of each, merged into one stream of events. */
import { randomBytes, randomInt } from 'node:crypto';
import type { FastifyRequest } from 'fastify';
import { type ErrorData, PdError } from '../../errors.ts';
import type { RequestOutput, SamplingParams, TokenLogprob } from '../../scheduler/types.ts';
import { engineRequestId, kvKeyOf } from '../../wire/ids.ts';
import { PREFILL_WITHIN_HEADER, readPrefillWithin } from '../../wire/overlap.ts';
import { AsyncQueue } from '../async-queue.ts';
import { Choice, type ChoiceDelta } from './choice.ts';
import type { ServerContext } from './context.ts';
import { badField, type SamplingBody } from './schemas.ts';

export interface Prompt {
  /** As given, or decoded from the token ids. */
  readonly text: string;
  readonly tokens: Int32Array;
  /** `cmpl-<id>-<index>` or `chatcmpl-<id>`: what producer and consumer agree on. */
  readonly serverId: string;
}

export interface Plan {
  readonly prompts: readonly Prompt[];
  readonly n: number;
  readonly sampling: Omit<SamplingParams, 'maxTokens'>;
  /** 0 scores the prompt alone (echo). Absent: as many as fit. */
  readonly maxTokens: number | undefined;
  readonly stops: readonly string[];
  readonly echo: boolean;
  /** On a consumer: its producer may still compute the prompts for so long. */
  readonly prefillWithinMs?: number;
}

/** Something new about choice `index` = prompt x n + completion. */
export interface ChoiceEvent {
  readonly index: number;
  readonly delta: ChoiceDelta;
  /** With the first event of a choice. */
  readonly start?: { readonly prompt: Prompt; readonly promptLogprobs?: readonly TokenLogprob[] };
}

/** The fields that `return_token_ids` adds to a choice, as vLLM names them. */
export function tokenIdsOf(body: SamplingBody, events: readonly ChoiceEvent[]): object {
  return body.return_token_ids ? { token_ids: events.flatMap(({ delta }) => delta.tokens) } : {};
}

/** The same for the prompt. Nothing where `event` is not the first of its choice. */
export function promptTokenIdsOf(body: SamplingBody, event: ChoiceEvent | undefined): object {
  return body.return_token_ids && event?.start ? { prompt_token_ids: [...event.start.prompt.tokens] } : {};
}

export interface Usage {
  readonly prompt_tokens: number;
  readonly total_tokens: number;
  readonly completion_tokens: number;
}

/** What the proxy says of a prefill that goes on. Only a consumer waits for one. */
export function prefillOf({ config }: ServerContext, request: FastifyRequest): Pick<Plan, 'prefillWithinMs'> {
  const ms =
    config.role === 'consumer' ? readPrefillWithin(request.headers[PREFILL_WITHIN_HEADER]) : undefined;
  return ms === undefined ? {} : { prefillWithinMs: ms };
}

/** Sampling parameters of a checked body. `logprobs`: alternatives per token. */
export function samplingOf(
  context: ServerContext,
  body: SamplingBody,
  logprobs: number | undefined,
  echo: boolean,
): Plan['sampling'] {
  const { eosTokenIds } = context.model;
  return {
    temperature: body.temperature ?? 1,
    topP: body.top_p ?? 1,
    topK: Math.max(body.top_k ?? 0, 0),
    seed: body.seed ?? randomInt(2 ** 31),
    minTokens: body.min_tokens ?? 0,
    stopTokenIds: [...new Set([...(body.ignore_eos ? [] : eosTokenIds), ...(body.stop_token_ids ?? [])])],
    ...(logprobs === undefined ? {} : { logprobs }),
    ...(logprobs === undefined || !echo ? {} : { promptLogprobs: logprobs }),
  };
}

/** Checks a tokenized prompt against vocabulary and context. `param` names the field that it came from. */
export function checkPrompt(
  context: ServerContext,
  tokens: readonly number[],
  maxTokens: number | undefined,
  param: string,
): Int32Array {
  const { maxModelLen, vocabSize } = context.core.info;
  if (tokens.length === 0) throw badField(param, 'is empty: there is nothing to go on from');
  const unknown = tokens.find((token) => token >= vocabSize);
  if (unknown !== undefined) {
    throw badField(param, `token id ${unknown} is not in the vocabulary of ${vocabSize}`);
  }
  const output = Math.max(maxTokens ?? 1, 1);
  if (tokens.length + output > maxModelLen) {
    throw new PdError(
      'CONTEXT_EXCEEDED',
      `${param}: ${tokens.length} prompt tokens and ${output} to generate are more than the context of ${maxModelLen}`,
      { param },
    );
  }
  return Int32Array.from(tokens);
}

/** Refuses text that no tokenizer makes short enough, before a tokenizer spends time on it. */
export function encodePrompt(
  context: ServerContext,
  text: string,
  addSpecialTokens: boolean,
  param: string,
): readonly number[] {
  const { maxModelLen } = context.core.info;
  if (text.length > maxModelLen * 256) {
    throw new PdError(
      'CONTEXT_EXCEEDED',
      `${param}: ${text.length} characters are far beyond the context of ${maxModelLen} tokens`,
      { param },
    );
  }
  return context.model.encode(text, { addSpecialTokens });
}

/** One run of a plan. Iterate once; `usage` is right when the iteration has ended. */
export class GenerationRun {
  readonly #context: ServerContext;
  readonly #plan: Plan;
  readonly #choices: Choice[] = [];
  readonly #abort = new AbortController();
  #kvFailure: ErrorData | undefined;

  constructor(context: ServerContext, plan: Plan) {
    const { maxNumSeqs } = context.config;
    if (plan.n > maxNumSeqs)
      throw badField('n', `${plan.n} is more than this worker's batch of ${maxNumSeqs}`);
    this.#context = context;
    this.#plan = plan;
  }

  /** On a producer, once the iteration has ended: why KV of a prompt will not come to its consumer. */
  get kvFailure(): ErrorData | undefined {
    return this.#kvFailure;
  }

  get usage(): Usage {
    const { prompts, maxTokens } = this.#plan;
    const prompt = prompts.reduce((sum, { tokens }) => sum + tokens.length, 0);
    const completion = maxTokens === 0 ? 0 : this.#choices.reduce((sum, choice) => sum + choice.tokens, 0);
    return { prompt_tokens: prompt, total_tokens: prompt + completion, completion_tokens: completion };
  }

  /** Throws the first error of any prompt; the others are aborted then, as they are when `signal` fires or the loop is left. */
  async *events(signal: AbortSignal): AsyncGenerator<ChoiceEvent> {
    const all = AbortSignal.any([signal, this.#abort.signal]);
    const merged = new AsyncQueue<ChoiceEvent>();
    const pumps = this.#plan.prompts.map((prompt, at) => this.#pump(prompt, at, merged, all));
    Promise.all(pumps).then(
      () => merged.end(),
      (error: unknown) => {
        this.#abort.abort();
        merged.fail(error);
      },
    );
    try {
      yield* merged;
    } finally {
      this.#abort.abort();
      await Promise.allSettled(pumps);
    }
  }

  async #pump(prompt: Prompt, at: number, out: AsyncQueue<ChoiceEvent>, signal: AbortSignal): Promise<void> {
    const { core, metrics, config, model } = this.#context;
    const { n, sampling, stops, echo, maxTokens, prefillWithinMs } = this.#plan;
    const offset = echo ? prompt.text.length : 0;
    const choices = Array.from({ length: n }, () => new Choice(model, stops, sampling.minTokens, offset));
    this.#choices.push(...choices);
    const room = core.info.maxModelLen - prompt.tokens.length;
    const requestId = engineRequestId(
      prompt.serverId,
      config.randomizeRequestIds ? randomBytes(4).toString('hex') : undefined,
    );
    const generation = core.generate(
      {
        requestId,
        transferId: kvKeyOf({ serverId: prompt.serverId, requestId }, config.kvKey ?? 'transfer'),
        promptTokens: prompt.tokens,
        sampling: { ...sampling, maxTokens: Math.max(Math.min(maxTokens ?? room, room), 1) },
        n,
        ...(prefillWithinMs !== undefined && { prefillWithinMs }),
      },
      signal,
    );
    const { log } = this.#context;
    log.debug({ requestId, promptTokens: prompt.tokens.length, n, maxTokens }, 'request handed to the core');
    const began = performance.now();
    const last: (number | undefined)[] = [];
    const started = new Set<number>();
    let promptLogprobs: readonly TokenLogprob[] | undefined;
    for await (const output of generation) {
      const choice = choices[output.index];
      if (!choice || choice.finished) continue;
      promptLogprobs ??= output.promptLogprobs;
      this.#observe(output, began, last);
      const delta = withoutScored(choice.push(output), maxTokens);
      if (choice.stopped) generation.abort(output.index);
      const first = !started.has(output.index);
      started.add(output.index);
      out.push({
        index: at * n + output.index,
        delta,
        ...(first ? { start: { prompt, ...(promptLogprobs ? { promptLogprobs } : {}) } } : {}),
      });
    }
    // Whoever has asked for the prompt alone may tell the consumer, which would wait for its deadline.
    this.#kvFailure ??= await unless(signal, generation.kvSaved());
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

/** With `max_tokens: 0` one token is generated for want of a request without any, and left out. */
function withoutScored(delta: ChoiceDelta, maxTokens: number | undefined): ChoiceDelta {
  return maxTokens === 0 ? { text: '', tokens: [], logprobs: [], finishReason: 'length' } : delta;
}

/** Undefined once the signal has fired: nobody is interested any more. */
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
