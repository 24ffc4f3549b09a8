/**
 * One request's way through a pair (docs/protocol.md, "Discovery"):
 *
 *   client -> prefill copy -> producer, to the end of its answer   (its KV is on its way or kept by then)
 *          -> the original -> consumer -> its answer -> client
 *
 * Where both are ours, and the producer has little to do, both are asked at once (overlap.ts) and the consumer waits for the KV. Both get
 * the id that carries both KV addresses. An instance that does not take the request is replaced once.
 */
import { randomBytes } from 'node:crypto';
import type { ServerResponse } from 'node:http';
import { PdError } from '../errors.ts';
import { openAiError } from '../openai-error.ts';
import { proxyRequestId } from '../wire/ids.ts';
import { askConsumer, passOn } from './decode.ts';
import type { Attempt, ClientRequest, Exchange, ForwardParts } from './exchange.ts';
import { mayOverlap, overlapped } from './overlap.ts';
import { prefill } from './prefill.ts';
import type { JsonObject } from './prefill-copy.ts';
import { Prefills } from './prefills.ts';
import { type InstanceRegistry, instanceLabel, type Missing, type Pair } from './registry.ts';
import { releaseKv } from './release.ts';
import { InstanceRefused, requestHeaders } from './upstream.ts';
import { answerWith } from './whole-answer.ts';

export interface ForwarderOptions extends Omit<ForwardParts, 'prefills'> {
  readonly registry: InstanceRegistry;
  /** Most requests in prefill at a producer for which the consumer is asked at once; 0: always in turn. */
  readonly overlap: number;
}

/** How long others are preferred to an instance that refused a connection. */
const QUARANTINE_MS = 3_000;
/** nginx's number for a client that went away; only in logs and metrics. */
const CLIENT_GONE = 499;

export class Forwarder {
  readonly #options: ForwarderOptions;
  readonly #prefills = new Prefills();
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
    const count = this.#count++;
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
    const { upstream, metrics, log, overlap } = this.#options;
    const parts = { ...this.#options, prefills: this.#prefills };
    const headers = requestHeaders(exchange.headers, requestId);
    const attempt = { exchange, pair, requestId, headers };
    const { route, json } = exchange;
    const given = { pair, requestId, route, json };
    try {
      const atOnce = mayOverlap(pair, exchange) && this.#prefills.at(pair.producer) < overlap;
      if (atOnce) metrics.overlapped.inc();
      const decoded = await (atOnce ? overlapped(parts, attempt) : inTurn(parts, attempt));
      if (!decoded) releaseKv(upstream, log, given);
    } catch (error) {
      releaseKv(upstream, log, given, error instanceof InstanceRefused ? error.instance : undefined);
      throw error;
    }
  }
}

/** False where KV is left that nobody decodes. */
async function inTurn(parts: ForwardParts, attempt: Attempt): Promise<boolean> {
  const { exchange, requestId } = attempt;
  const refusal = await prefill(parts, attempt, exchange.signal);
  if (refusal) {
    answerWith(refusal, exchange.out, requestId);
    return true;
  }
  const response = await askConsumer(parts, attempt, parts.decodeIdleTimeoutMs, exchange.signal);
  return await passOn(parts, attempt, response);
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
