/**
 * One request's way through a pair (docs/protocol.md, "Discovery"):
 *
 *   client -> prefill copy -> producer, to the end of its answer   (its KV is on its way or kept by then)
 *          -> the original -> consumer -> its answer -> client
 *
 * Both get the id that carries both KV addresses. An instance that does not take the connection is replaced once.
 */
import { randomBytes } from 'node:crypto';
import type { IncomingHttpHeaders, ServerResponse } from 'node:http';
import { PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import { openAiError } from '../openai-error.ts';
import { proxyRequestId } from '../wire/ids.ts';
import { deadlineWithin } from './deadline.ts';
import type { ProxyMetrics } from './metrics.ts';
import { type JsonObject, prefillCopy } from './prefill-copy.ts';
import { type InstanceRegistry, instanceLabel, type Missing, type Pair } from './registry.ts';
import { isEventStream, relay } from './relay.ts';
import { releaseKv } from './release.ts';
import { InstanceRefused, reasonOf, requestHeaders, timeoutError, type Upstream } from './upstream.ts';
import { answerWith, isDraining, type WholeAnswer, wholeAnswer } from './whole-answer.ts';

export interface ForwarderOptions {
  readonly registry: InstanceRegistry;
  readonly upstream: Upstream;
  readonly metrics: ProxyMetrics;
  readonly log: Logger;
  readonly prefillTimeoutMs: number;
  readonly decodeIdleTimeoutMs: number;
}

/** A client's request as it came. */
export interface ClientRequest {
  readonly route: string;
  readonly headers: IncomingHttpHeaders;
  readonly body: Buffer;
  readonly out: ServerResponse;
  /** Aborted when the proxy stops. */
  readonly stop: AbortSignal;
}

/** A request under way. */
interface Exchange extends ClientRequest {
  readonly json: JsonObject;
  readonly arrivedMs: number;
  /** Aborted once the client has gone or the proxy stops. */
  readonly signal: AbortSignal;
  /** Of the last pair tried. */
  requestId: string | undefined;
}

/** How long others are preferred to an instance that refused a connection. */
const QUARANTINE_MS = 3_000;
/** Of an error answer, bytes. */
const MAX_ERROR_BODY = 1024 * 1024;
/** nginx's number for a client that went away; only in logs and metrics. */
const CLIENT_GONE = 499;

export class Forwarder {
  readonly #options: ForwarderOptions;
  #count = 0;

  constructor(options: ForwarderOptions) {
    this.#options = options;
  }

  /** Answers in every case; never rejects. */
  async handle(request: ClientRequest): Promise<void> {
    const { log, metrics } = this.#options;
    const { out, route } = request;
    const abort = new AbortController();
    const stop = () => abort.abort(request.stop.reason);
    request.stop.addEventListener('abort', stop, { once: true });
    let gone = false;
    out.once('close', () => {
      if (out.writableFinished) return;
      gone = true;
      abort.abort(new PdError('REQUEST_ABORTED', `${route}: the client went away`));
    });
    const arrivedMs = performance.now();
    let exchange: Exchange | undefined;
    metrics.inFlight.inc();
    try {
      const json = parseBody(request.body);
      exchange = { ...request, json, arrivedMs, signal: abort.signal, requestId: undefined };
      await this.#run(exchange);
    } catch (cause) {
      const error = PdError.from(cause);
      const level = gone || error.status < 500 ? 'info' : 'warn';
      const requestId = exchange?.requestId;
      log[level]({ requestId, code: error.code }, `${route}: ${error.message}`);
      answerError(out, error, requestId);
    } finally {
      request.stop.removeEventListener('abort', stop);
      metrics.inFlight.dec();
      metrics.requests.inc({ route, status: gone ? CLIENT_GONE : out.statusCode });
    }
  }

  async #run(exchange: Exchange): Promise<void> {
    const { registry, metrics, log } = this.#options;
    const count = ++this.#count;
    const model = typeof exchange.json['model'] === 'string' ? exchange.json['model'] : undefined;
    const exclude = new Set<string>();
    let refused: InstanceRefused | undefined;
    for (;;) {
      const pair = registry.pair({ model, exclude });
      if (typeof pair === 'string') throw refused ?? noInstance(pair, registry);
      const { producer, consumer } = pair;
      exchange.requestId = proxyRequestId(producer.zmq, consumer.zmq, randomBytes(16).toString('hex'));
      log.info(
        { requestId: exchange.requestId },
        `handle_request count: ${count}, ${instanceLabel(producer)} 👉 ${instanceLabel(consumer)}`,
      );
      try {
        return await this.#through(pair, exchange, exchange.requestId);
      } catch (error) {
        if (!(error instanceof InstanceRefused)) throw error;
        registry.quarantine(error.instance.httpAddress, QUARANTINE_MS);
        if (refused) throw error;
        refused = error;
        exclude.add(error.instance.httpAddress);
        metrics.replaced.inc();
        log.warn({ requestId: exchange.requestId }, `${error.message}; trying another pair`);
      }
    }
  }

  async #through(pair: Pair, exchange: Exchange, requestId: string): Promise<void> {
    const { upstream, log } = this.#options;
    const headers = requestHeaders(exchange.headers, requestId);
    const given = { ...exchange, pair, requestId };
    try {
      const refusal = await this.#prefill(pair, exchange, headers);
      if (refusal) return answerWith(refusal, exchange.out, requestId);
      const decoded = await this.#decode(pair, exchange, headers, requestId);
      if (!decoded) releaseKv(upstream, log, given);
    } catch (error) {
      releaseKv(upstream, log, given, error instanceof InstanceRefused ? error.instance : undefined);
      throw error;
    }
  }

  /** Resolves once the producer is done; with its answer where that is an error, which is the client's then. */
  async #prefill(
    { producer }: Pair,
    exchange: Exchange,
    headers: Readonly<Record<string, string>>,
  ): Promise<WholeAnswer | undefined> {
    const { upstream, metrics, prefillTimeoutMs } = this.#options;
    const what = `prefill of ${exchange.route}`;
    const started = performance.now();
    const deadline = deadlineWithin(exchange.signal, prefillTimeoutMs, () =>
      timeoutError(producer, what, prefillTimeoutMs, '--prefill-timeout'),
    );
    try {
      const response = await upstream.ask({
        instance: producer,
        path: exchange.route,
        what,
        headers,
        body: JSON.stringify(prefillCopy(exchange.json)),
        // The deadline above counts to the end of the body.
        headersTimeoutMs: 0,
        timeoutName: '--prefill-timeout',
        signal: deadline.signal,
      });
      const ok = response.statusCode >= 200 && response.statusCode < 300;
      let answer: WholeAnswer;
      try {
        answer = await wholeAnswer(response, ok ? 0 : MAX_ERROR_BODY);
      } catch (error) {
        if (deadline.signal.aborted) throw deadline.signal.reason;
        throw new InstanceRefused(producer, what, `its answer broke off: ${reasonOf(error)}`, error);
      }
      if (!ok) {
        if (isDraining(answer)) throw new InstanceRefused(producer, what, 'it is stopping');
        return answer;
      }
      metrics.prefillSeconds.observe((performance.now() - started) / 1_000);
      return undefined;
    } finally {
      deadline.clear();
    }
  }

  /** False where the consumer answered with an error. */
  async #decode(
    { consumer }: Pair,
    exchange: Exchange,
    headers: Readonly<Record<string, string>>,
    requestId: string,
  ): Promise<boolean> {
    const { upstream, metrics, decodeIdleTimeoutMs } = this.#options;
    const what = `decode of ${exchange.route}`;
    const timeoutName = '--decode-idle-timeout';
    const response = await upstream.ask({
      instance: consumer,
      path: exchange.route,
      what,
      headers,
      body: exchange.body,
      headersTimeoutMs: decodeIdleTimeoutMs,
      timeoutName,
      signal: exchange.signal,
    });
    if (response.statusCode === 503 && !isEventStream(response)) {
      const tooLong = timeoutError(consumer, what, decodeIdleTimeoutMs, timeoutName);
      const timer = setTimeout(() => response.body.destroy(tooLong), decodeIdleTimeoutMs);
      const answer = await wholeAnswer(response, MAX_ERROR_BODY).finally(() => clearTimeout(timer));
      if (isDraining(answer)) throw new InstanceRefused(consumer, what, 'it is stopping');
      answerWith(answer, exchange.out, requestId);
      return false;
    }
    await relay(response, exchange.out, {
      instance: consumer,
      what,
      requestId,
      idleMs: decodeIdleTimeoutMs,
      timeoutName,
      signal: exchange.signal,
      onFirstEvent: () => metrics.firstEventSeconds.observe((performance.now() - exchange.arrivedMs) / 1_000),
    });
    return response.statusCode < 400;
  }
}

function parseBody(body: Buffer): JsonObject {
  let json: unknown;
  try {
    json = JSON.parse(body.toString('utf8'));
  } catch (error) {
    throw new PdError('REQUEST_INVALID', `the body is not JSON: ${(error as Error).message}`);
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw new PdError('REQUEST_INVALID', 'the body must be a JSON object');
  }
  return json as JsonObject;
}

function noInstance(missing: Missing, registry: InstanceRegistry): PdError {
  const counts = `known now: ${registry.list('producer').length} producers, ${registry.list('consumer').length} consumers`;
  if (missing === 'match') {
    return new PdError(
      'NO_INSTANCE',
      `no producer fits a consumer: their fingerprints, model names or send types differ (${counts}); GET /health lists them`,
    );
  }
  const phase = missing === 'producer' ? 'prefill' : 'decode';
  return new PdError('NO_INSTANCE', `no ${missing} (${phase} instance) pings this proxy (${counts})`);
}

/** In OpenAI's form, where nothing has been sent yet. */
export function answerError(out: ServerResponse, error: PdError, requestId?: string): void {
  if (out.headersSent || out.destroyed) return;
  const body = JSON.stringify(openAiError(error));
  out.writeHead(error.status, {
    'content-type': 'application/json',
    'content-length': Buffer.byteLength(body),
    ...(requestId === undefined ? {} : { 'x-request-id': requestId }),
    ...(error.status === 503 ? { 'retry-after': '3' } : {}),
  });
  out.end(body);
}
