/**
 * One request's attempt with one pair (docs/protocol.md, "Discovery"):
 *
 *   client -> prefill copy -> producer, to the end of its answer   (its KV is on its way or kept by then)
 *          -> the original -> consumer -> its answer -> client
 *
 * Both get the id that carries both KV addresses. Where both are ours, and the producer has little to do, both are asked at once: the
 * consumer parses, tokenizes, schedules and asks for the KV while the prompt is computed. Then
 *
 *   producer  ok              the consumer's answer is waited for, as if it had been asked now
 *             error, refused  the consumer's request is aborted; the producer's error is the answer, or another pair is tried
 *   consumer  2xx             it has the KV, so nothing the producer says matters any more: passed on at once
 *             4xx             the request is at fault: passed on, the prefill aborted
 *             5xx             may be the producer's doing, so the producer's answer is waited for and goes first
 *             refused         the prefill is aborted; another pair is tried
 */
import type { IncomingHttpHeaders, ServerResponse } from 'node:http';
import type { ProxyConfig } from '../config/proxy-config.ts';
import { Cancellation, type Signal } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { reasonOf } from '../net/resolve.ts';
import type { Logger } from '../observability/log.ts';
import { monotonicMs } from '../observability/timelines.ts';
import { proxyRequestId } from '../wire/ids.ts';
import {
  KV_FAILED_HEADER,
  OUTPUT_TOKENS_HEADER,
  PREFILL_WITHIN_HEADER,
  readKvFailed,
  WIRE_HEADER,
  type Wire,
} from '../wire/overlap.ts';
import { appendPromptIds, PROMPT_IDS_HEADER } from '../wire/prompt-ids.ts';
import type { RequestBody } from './body.ts';
import type { Placement, Visit } from './coordinator.ts';
import type { ProxyMetrics } from './metrics.ts';
import { Notices } from './notices.ts';
import type { AttemptReceipt, AttemptStage, Receipt, Receipts } from './receipts.ts';
import type { InstanceRole } from './registry.ts';
import { answerWhole, isEventStream, relay } from './relay.ts';
import type { RequestTraces } from './request-trace.ts';
import type { StreamEnd } from './stream-end.ts';
import {
  type Call,
  InstanceRefused,
  readWhole,
  timeoutError,
  type Upstream,
  type UpstreamResponse,
  unavailableCode,
  type WholeAnswer,
} from './upstream.ts';

/** What attempts have in common. */
export interface ProxyContext {
  readonly config: ProxyConfig;
  readonly upstream: Upstream;
  readonly metrics: ProxyMetrics;
  readonly receipts: Receipts;
  readonly log: Logger;
  /** Where traces are made. */
  readonly traces: RequestTraces | undefined;
}

/** A client's request, and where its answer goes. */
export interface ClientRequest {
  readonly route: string;
  readonly headers: IncomingHttpHeaders;
  /** What instances are told of the proxies that it has passed, this one among them. */
  readonly via: string;
  readonly out: ServerResponse;
  /** Of the answer, where it is a stream. */
  readonly end: StreamEnd;
  readonly receipt: Receipt;
  /** Aborted once the client has gone or the proxy stops. */
  readonly signal: Signal;
}

/** Of an error answer, bytes. */
const MAX_ERROR_BODY = 1024 * 1024;
/** For the producer to answer after the client has the consumer's whole answer. */
const GRACE_MS = 2_000;

export class Attempt {
  readonly requestId: string;
  readonly #context: ProxyContext;
  readonly #request: ClientRequest;
  readonly #body: RequestBody;
  readonly #prefillCall: Call;
  readonly #decodeCall: Call;
  /** Both ends speak the native hand-over, and are told to: then the consumer takes over the token that the producer draws. */
  readonly #native: boolean;
  readonly #notices: Notices;
  /** Each aborts one instance's request, for the reason it is given; the request's own signal aborts both. */
  readonly #abortPrefill = new Cancellation();
  readonly #abortDecode = new Cancellation();
  readonly #visit: Visit;
  readonly #placement: Placement;
  readonly #receipt: AttemptReceipt;

  constructor(context: ProxyContext, request: ClientRequest, body: RequestBody, visit: Visit) {
    const { pair, alone } = visit.placement;
    const { producer, consumer } = pair;
    const { route, receipt } = request;
    this.#context = context;
    this.#request = request;
    this.#body = body;
    this.#visit = visit;
    this.#placement = visit.placement;
    this.#prefillCall = {
      instance: producer,
      what: `prefill of ${route}`,
      timeoutMs: context.config.prefillTimeoutMs,
      timeoutName: '--prefill-timeout',
    };
    this.#decodeCall = {
      instance: consumer,
      what: `decode of ${route}`,
      timeoutMs: context.config.decodeIdleTimeoutMs,
      timeoutName: '--decode-idle-timeout',
    };
    // An id that names nobody is computed where it comes to. No two attempts have the same pair, so no instance gets one id twice.
    this.requestId = alone ? receipt.id : proxyRequestId(producer.zmq, consumer.zmq, receipt.id);
    this.#native = !alone && Boolean(producer.native && consumer.native);
    this.#receipt = context.receipts.attempt(receipt, {
      requestId: this.requestId,
      placement: visit.placement,
      native: this.#native,
      spans: receipt.trace && context.traces?.attempt(),
    });
    const subject = { requestId: this.requestId, route, prompts: body.prompts };
    this.#notices = new Notices(context.upstream, context.log, pair, subject);
  }

  /**
   * Answers the client. Throws what went wrong: InstanceRefused only while the client has nothing, so that another pair may be tried.
   * KV that nobody will decode is released either way. To be called once.
   */
  async run(): Promise<void> {
    const { signal } = this.#request;
    const abort = () => {
      this.#abortPrefill.abort(signal.reason);
      this.#abortDecode.abort(signal.reason);
    };
    signal.addEventListener('abort', abort, { once: true });
    if (signal.aborted) abort();
    const { alone } = this.#placement;
    try {
      if (alone) {
        await this.#passOn(await this.#askConsumer());
        return;
      }
      const decoded = await (this.#mayOverlap() ? this.#overlapped() : this.#inTurn());
      if (!decoded) this.#notices.release();
    } catch (error) {
      const refusal = error instanceof InstanceRefused ? error.instance : undefined;
      if (!alone) this.#notices.release(refusal);
      this.#receipt.refusedBy = refusal?.role;
      this.#receipt.failure = PdError.from(error).message;
      throw error;
    } finally {
      if (this.#receipt.at.end === 0) this.#stamp('end');
      signal.removeEventListener('abort', abort);
    }
  }

  /**
   * Both can, the producer is not busy, and there is one prompt: of several, the first may be answered before the last is computed. By the
   * native hand-over several are always asked at both ends: a producer keeps KV in its own blocks, which all of them may not fit into.
   * Without it a consumer in GET can only ask again and again for what is not there yet.
   */
  #mayOverlap(): boolean {
    const { pair, early } = this.#placement;
    if (!pair.producer.overlaps || !pair.consumer.overlaps) return false;
    if (!this.#native && pair.consumer.sendType === 'GET') return false;
    return this.#body.prompts === 1 ? early : this.#native;
  }

  /** False where KV may be left that nobody decodes. */
  async #inTurn(): Promise<boolean> {
    const refusal = await this.#prefill();
    if (!refusal) return await this.#passOn(await this.#askConsumer());
    this.#answerWhole(refusal);
    return true;
  }

  /** Likewise; both are asked at once. */
  async #overlapped(): Promise<boolean> {
    this.#context.metrics.overlapped.inc();
    this.#receipt.overlapped = true;
    const prefilling = this.#prefill();
    const asking = this.#askConsumer(true);
    try {
      const first = await Promise.race([settled(asking, 'consumer'), settled(prefilling, 'producer')]);
      if (first === 'producer') {
        const refusal = await prefilling;
        if (!refusal) return await this.#passOn(await this.#headAfterPrefill(asking));
        this.#answerWhole(refusal);
        return false;
      }
      const response = await asking;
      if (response.statusCode >= 500 && !isEventStream(response)) {
        const answer = await this.#decodeError(response);
        this.#answerWhole((await prefilling) ?? answer);
        return false;
      }
      if (response.statusCode >= 400) this.#abortPrefill.abort(DECIDED);
      const decoded = await this.#passOn(response);
      if (decoded) await this.#logLatePrefill(prefilling);
      return decoded;
    } finally {
      this.#abortPrefill.abort(DECIDED);
      this.#abortDecode.abort(DECIDED);
    }
  }

  /**
   * Resolves once the producer is done; with its answer where that is an error, which is the client's then. Throws InstanceRefused,
   * UPSTREAM_FAILED, UPSTREAM_TIMEOUT or why it was aborted.
   */
  async #prefill(): Promise<WholeAnswer | undefined> {
    const { upstream, metrics } = this.#context;
    const call = this.#prefillCall;
    let tookMs: number | undefined;
    const startedMs = performance.now();
    const signal = this.#abortPrefill;
    const timer = setTimeout(() => this.#abortPrefill.abort(timeoutError(call)), call.timeoutMs);
    this.#stamp('prefill');
    try {
      const response = await upstream.ask(call, {
        ...this.#sentTo('producer', this.#native ? this.#body.nativePrefill : this.#body.prefill),
        signal,
        headersTimeoutMs: 0, // the timer runs to the end of the body
      });
      const ok = response.statusCode >= 200 && response.statusCode < 300;
      const answer = await readWhole(response, ok ? 0 : MAX_ERROR_BODY).catch((error: unknown) => {
        if (signal.aborted) throw signal.reason;
        throw new InstanceRefused(call, `its answer broke off: ${reasonOf(error)}`, error);
      });
      if (!ok) return this.#judged(answer, call);
      this.#stamp('prefilled');
      tookMs = performance.now() - startedMs;
      metrics.prefillSeconds.observe(tookMs / 1_000);
      this.#reportKvFailure(response);
      return undefined;
    } finally {
      clearTimeout(timer);
      this.#visit.prefilled(this.#placement, tookMs);
    }
  }

  /** The producer has computed the prompt, but may say that its KV could not be sent: then the consumer is not to wait for it. */
  #reportKvFailure({ headers }: UpstreamResponse): void {
    const failure = readKvFailed(headers[KV_FAILED_HEADER]);
    if (!failure) return;
    const { requestId } = this;
    const text = `${this.#prefillCall.what}: its KV could not be sent: ${failure.message}`;
    this.#context.log.warn({ requestId, code: failure.code }, text);
    this.#notices.failed(failure);
  }

  /** Resolves with the head of the answer. `early`: while the prompt is computed, so that it may take as long as that. */
  async #askConsumer(early = false): Promise<UpstreamResponse> {
    const { config, upstream } = this.#context;
    const sent = this.#sentTo('consumer', this.#body.original);
    if (early) sent.headers[PREFILL_WITHIN_HEADER] = String(config.prefillTimeoutMs);
    this.#stamp('decode');
    const response = await upstream.ask(this.#decodeCall, {
      ...sent,
      signal: this.#abortDecode,
      ...(early && { headersTimeoutMs: 0 }),
    });
    this.#stamp('answered');
    return response;
  }

  /** With the ids of the prompt behind the body, where the instance takes them. */
  #sentTo(role: InstanceRole, body: Uint8Array) {
    const { route: path } = this.#request;
    const headers = this.#headersTo(role);
    const { ids, outputTokens } = this.#body;
    if (role === 'producer' && outputTokens) headers[OUTPUT_TOKENS_HEADER] = String(outputTokens);
    if (!ids || !this.#placement.takesIds[role]) return { path, body, headers };
    headers[PROMPT_IDS_HEADER] = String(ids.length);
    return { path, body: appendPromptIds(body, ids), headers };
  }

  /** Who asks, by which way, and which trace it belongs to: the client's, unless one is made here. */
  #headersTo(role: InstanceRole): Record<string, string> {
    const { upstream, traces } = this.#context;
    const { via, receipt, headers: incoming } = this.#request;
    const headers: Record<string, string> = { 'x-request-id': this.requestId, via };
    headers['content-type'] = 'application/json';
    const pass = (name: string) => {
      const value = incoming[name];
      if (typeof value === 'string') headers[name] = value;
    };
    if (upstream.passesKeys) pass('authorization');
    pass('user-agent');
    const { spans } = this.#receipt;
    if (receipt.trace && spans) Object.assign(headers, traces?.headers(receipt.trace, spans[role]));
    else {
      pass('traceparent');
      pass('tracestate');
    }
    if (this.#native) headers[WIRE_HEADER] = 'native' satisfies Wire;
    return headers;
  }

  /** The head of the consumer's answer where the producer has answered first: the time for decode begins now. */
  async #headAfterPrefill(asking: Promise<UpstreamResponse>): Promise<UpstreamResponse> {
    const told = this.#notices.prefilled();
    const call = this.#decodeCall;
    const late = setTimeout(() => this.#abortDecode.abort(timeoutError(call)), call.timeoutMs);
    try {
      return await asking;
    } finally {
      told();
      clearTimeout(late);
    }
  }

  #answerWhole(answer: WholeAnswer): void {
    const { out, end } = this.#request;
    answerWhole(answer, out, { requestId: this.requestId, end });
  }

  /** False where the consumer answered with an error. Throws InstanceRefused, with nothing passed on, where it is stopping. */
  async #passOn(response: UpstreamResponse): Promise<boolean> {
    const { firstEventSeconds } = this.#context.metrics;
    const { out, end, signal, receipt } = this.#request;
    if (response.statusCode === 503 && !isEventStream(response)) {
      this.#answerWhole(await this.#decodeError(response));
      return false;
    }
    let firstEventMs: number | undefined;
    await relay(response, out, {
      call: this.#decodeCall,
      requestId: this.requestId,
      end,
      signal,
      onFirstEvent: () => {
        this.#stamp('relayed');
        firstEventMs = monotonicMs() - receipt.receivedAt;
        firstEventSeconds.observe(firstEventMs / 1_000);
      },
    });
    // The client has it, whatever is still to be heard of the producer.
    this.#stamp('end');
    this.#judge(this.#decodeCall, response.statusCode, firstEventMs);
    return response.statusCode < 400;
  }

  /** The consumer's whole error answer. Throws InstanceRefused where it is stopping. */
  async #decodeError(response: UpstreamResponse): Promise<WholeAnswer> {
    const call = this.#decodeCall;
    const timer = setTimeout(() => response.destroy(timeoutError(call)), call.timeoutMs);
    const answer = await readWhole(response, MAX_ERROR_BODY)
      .catch((error: unknown) => {
        throw PdError.from(error, 'UPSTREAM_FAILED', { peer: call.instance.httpAddress });
      })
      .finally(() => clearTimeout(timer));
    return this.#judged(answer, call);
  }

  #stamp(stage: AttemptStage): void {
    this.#receipt.at[stage] = monotonicMs();
  }

  /** Throws InstanceRefused where the instance is stopping. */
  #judged(answer: WholeAnswer, call: Call): WholeAnswer {
    const code = unavailableCode(answer);
    if (code === 'SERVER_DRAINING') throw new InstanceRefused(call, 'it is stopping');
    // That one is well, and has much to read: its clients are to come again later.
    this.#judge(call, code === 'READER_BUSY' ? 429 : answer.response.statusCode);
    return answer;
  }

  /** An error of the server speaks against an instance, one of the request does not. */
  #judge({ instance }: Call, statusCode: number, firstEventMs?: number): void {
    this.#visit.judge(this.#placement, instance.role, statusCode < 500, firstEventMs);
  }

  /** The client has its answer, so what becomes of the producer's is only logged. */
  async #logLatePrefill(prefilling: Promise<WholeAnswer | undefined>): Promise<void> {
    const late = () =>
      new PdError('UPSTREAM_TIMEOUT', `nothing within ${GRACE_MS} ms of the consumer's answer`);
    const timer = setTimeout(() => this.#abortPrefill.abort(late()), GRACE_MS);
    try {
      if (await prefilling) throw new PdError('UPSTREAM_FAILED', 'the producer answered with an error');
    } catch (error) {
      const { code, message } = PdError.from(error);
      const text = `${this.#prefillCall.what}, after its decode: ${message}`;
      this.#context.log.info({ requestId: this.requestId, code }, text);
    } finally {
      clearTimeout(timer);
    }
  }
}

/** Resolves with `name` however the promise ends, which is thereby handled: nobody need await it. */
function settled<N extends string>(promise: Promise<unknown>, name: N): Promise<N> {
  return promise.then(
    () => name,
    () => name,
  );
}

/** Of every request: an error of its own takes microseconds, for a stack that nobody reads. */
const DECIDED = new PdError('REQUEST_ABORTED', 'the other instance of the pair has decided the request');
