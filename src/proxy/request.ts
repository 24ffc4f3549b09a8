/**
 * A client's request from its arrival to its answer: it goes to a pair, and once more to another where an instance does not take it. What
 * happens with one pair is in attempt.ts.
 */
import { PdError } from '../errors.ts';
import { plural } from '../observability/bytes.ts';
import { Attempt, type ProxyContext, type ReceivedRequest } from './attempt.ts';
import type { RequestBody } from './body.ts';
import type { PromptToPlace } from './placement.ts';
import { type InstancePair, type InstanceRegistry, instanceLabel, type Missing } from './registry.ts';
import { answerError } from './relay.ts';
import { InstanceRefused } from './upstream.ts';

/** How long other instances are preferred to one that refused a connection. */
const QUARANTINE_MS = 3_000;
/** nginx's number for a client that went away; only in logs and metrics. */
const CLIENT_GONE = 499;

export class ProxiedRequest {
  readonly #context: ProxyContext;
  readonly #received: ReceivedRequest;
  readonly #arrivedMs = performance.now();
  /** Ends whatever is under way: the client has gone, or the proxy stops. */
  readonly #abort = new AbortController();
  #clientGone = false;
  /** Of the last attempt. */
  #requestId: string | undefined;

  constructor(context: ProxyContext, received: ReceivedRequest) {
    this.#context = context;
    this.#received = received;
  }

  /** Answers in every case; never rejects. `stop` is aborted when the proxy stops. To be called once. */
  async answer(stop: AbortSignal): Promise<void> {
    const { metrics, bodies, caches } = this.#context;
    const { signal } = this.#abort;
    const { route, body, out } = this.#received;
    const onStop = () => this.#abort.abort(stop.reason);
    stop.addEventListener('abort', onStop, { once: true });
    out.once('close', () => {
      if (out.writableFinished) return;
      this.#clientGone = true;
      this.#abort.abort(new PdError('REQUEST_ABORTED', `${route}: the client went away`));
    });
    metrics.inFlight.inc();
    try {
      const read = await bodies.read(body, signal, caches.wanted);
      signal.throwIfAborted();
      await this.#throughPairs(read);
    } catch (cause) {
      this.#fail(PdError.from(cause));
    } finally {
      stop.removeEventListener('abort', onStop);
      metrics.inFlight.dec();
      metrics.requests.inc({ route, status: this.#clientGone ? CLIENT_GONE : out.statusCode });
    }
  }

  async #throughPairs(body: RequestBody): Promise<void> {
    const { config, registry, caches, metrics, log } = this.#context;
    const count = this.#context.nextCount();
    const request = { ...this.#received, body, arrivedMs: this.#arrivedMs, signal: this.#abort.signal };
    /** HTTP addresses of instances that did not take the request. */
    const exclude = new Set<string>();
    let refused: InstanceRefused | undefined;
    const prompt: PromptToPlace = {
      tokens: body.tokens,
      session: sessionOf(this.#received.headers[config.sessionHeader]) ?? body.user,
      cached: (address) => caches.cached(address, body),
    };
    for (;;) {
      const pair = registry.pair({ model: body.model, exclude, prompt });
      if (typeof pair === 'string') throw refused ?? noPair(pair, registry);
      const uncached = this.#placed(pair, body);
      const attempt = new Attempt(this.#context, request, pair, uncached);
      const { requestId } = attempt;
      this.#requestId = requestId;
      log.info(
        { requestId },
        `handle_request count: ${count}, ${instanceLabel(pair.producer)} 👉 ${instanceLabel(pair.consumer)}`,
      );
      try {
        return await attempt.run();
      } catch (error) {
        if (!(error instanceof InstanceRefused)) throw error;
        registry.quarantine(error.instance.httpAddress, QUARANTINE_MS);
        if (refused) throw error;
        refused = error;
        exclude.add(error.instance.httpAddress);
        metrics.replaced.inc();
        log.warn({ requestId }, `${error.message}; trying another pair`);
      }
    }
  }

  /** Notes what the pair is given; returns how many tokens are left for its producer to compute. */
  #placed({ producer, consumer }: InstancePair, body: RequestBody): number {
    const { caches, metrics } = this.#context;
    for (const instance of [consumer, producer]) {
      const { role } = instance;
      const cached = caches.cached(instance.httpAddress, body);
      metrics.placedTokens.inc({ role, cached: 'yes' }, cached);
      metrics.placedTokens.inc({ role, cached: 'no' }, body.tokens - cached);
    }
    const uncached = body.tokens - caches.cached(producer.httpAddress, body);
    for (const instance of [producer, consumer]) caches.sent(instance, body);
    return uncached;
  }

  #fail(error: PdError): void {
    const level = this.#clientGone || error.status < 500 ? 'info' : 'warn';
    const { route, out } = this.#received;
    this.#context.log[level]({ requestId: this.#requestId, code: error.code }, `${route}: ${error.message}`);
    answerError(out, error, this.#requestId);
  }
}

function sessionOf(header: string | string[] | undefined): string | undefined {
  return Array.isArray(header) ? header[0] : header;
}

function noPair(missing: Missing, registry: InstanceRegistry): PdError {
  const counts = `known now: ${plural(registry.list('producer').length, 'producer')}, ${plural(registry.list('consumer').length, 'consumer')}`;
  if (missing === 'match') {
    return new PdError(
      'NO_INSTANCE',
      `no producer fits a consumer: their fingerprints, model names or send types differ (${counts}); GET /health lists them`,
    );
  }
  const phase = missing === 'producer' ? 'prefill' : 'decode';
  return new PdError('NO_INSTANCE', `no ${missing} (${phase} instance) pings this proxy (${counts})`);
}
