/**
 * A client's request from its arrival to its answer: it goes to a pair, and to others where an instance does not take it. What
 * happens with one pair is in attempt.ts.
 */
import { hash } from 'node:crypto';
import { setTimeout } from 'node:timers/promises';
import { PdError } from '../errors.ts';
import { plural } from '../observability/bytes.ts';
import { monotonicMs } from '../observability/timelines.ts';
import { Attempt, type PlacedPrompt, type ProxyContext, type ReceivedRequest } from './attempt.ts';
import type { RequestBody } from './body.ts';
import type { PromptToPlace } from './placement.ts';
import { type InstancePair, type InstanceRegistry, instanceLabel, type Missing } from './registry.ts';
import { answerError } from './relay.ts';
import { backoffMs, MOST_RETRIES } from './retry-budget.ts';
import { InstanceRefused } from './upstream.ts';

/** How long other instances are preferred to one that refused a connection. */
const QUARANTINE_MS = 3_000;
/** Classes on either side of 0; a priority beyond them counts as the last. */
const MOST_PRIORITY = 100;
/** nginx's number for a client that went away; only in logs and metrics. */
const CLIENT_GONE = 499;

export class ProxiedRequest {
  readonly #context: ProxyContext;
  readonly #received: ReceivedRequest;
  readonly #receivedAt = monotonicMs();
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
      const read = await bodies.read(body, signal, caches.wanted, route);
      signal.throwIfAborted();
      const release = await this.#admitted(read);
      try {
        await this.#throughPairs(read, monotonicMs());
      } finally {
        release();
      }
    } catch (cause) {
      this.#fail(PdError.from(cause));
    } finally {
      stop.removeEventListener('abort', onStop);
      metrics.inFlight.dec();
      metrics.requests.inc({ route, status: this.#clientGone ? CLIENT_GONE : out.statusCode });
    }
  }

  async #throughPairs(body: RequestBody, readAt: number): Promise<void> {
    const { config, registry, caches, metrics, retries, log } = this.#context;
    retries.earn();
    const count = this.#context.nextCount();
    const { holder } = this.#received;
    const { signal } = this.#abort;
    const request = { ...this.#received, body, receivedAt: this.#receivedAt, readAt, signal };
    /** HTTP addresses of instances that did not take the request. */
    const exclude = new Set<string>();
    let refused: InstanceRefused | undefined;
    const prompt: PromptToPlace = {
      tokens: body.tokens,
      session: single(this.#received.headers[config.sessionHeader]) ?? body.user,
      cached: (address) => caches.cached(address, body),
    };
    for (;;) {
      const pair = registry.pair({ model: body.model, exclude, prompt });
      if (typeof pair === 'string') throw refused ?? noPair(pair, registry);
      const { over, ...placed } = this.#placed(pair, body);
      const attempt = new Attempt(this.#context, request, pair, placed);
      const { requestId } = attempt;
      this.#requestId = requestId;
      log.info(
        { requestId, ...(holder !== undefined && { key: holder }) },
        `handle_request count: ${count}, ${instanceLabel(pair.producer)} 👉 ${instanceLabel(pair.consumer)}`,
      );
      try {
        await attempt.run();
        return;
      } catch (error) {
        this.#blame(PdError.from(error));
        if (!(error instanceof InstanceRefused)) throw error;
        registry.quarantine(error.instance.httpAddress, QUARANTINE_MS);
        refused = error;
        exclude.add(error.instance.httpAddress);
        if (exclude.size > MOST_RETRIES) throw error;
        if (!retries.spend()) {
          metrics.retries.inc({ result: 'over_budget' });
          throw error;
        }
        metrics.retries.inc({ result: 'tried' });
        metrics.replaced.inc();
        log.warn({ requestId }, `${error.message}; trying another pair`);
        await setTimeout(backoffMs(exclude.size), undefined, { signal }).catch(() => signal.throwIfAborted());
      } finally {
        over();
      }
    }
  }

  /** Resolves once it may begin. */
  async #admitted({ tokens, priority }: RequestBody): Promise<() => void> {
    const { admission, metrics } = this.#context;
    const { headers, holder } = this.#received;
    const told = Number(single(headers['x-priority']) ?? priority);
    const end = metrics.queueSeconds.startTimer();
    const release = await admission.enter({
      key: holder ?? keyOf(single(headers.authorization)),
      priority: Math.max(-MOST_PRIORITY, Math.min(MOST_PRIORITY, Number.isInteger(told) ? told : 0)),
      tokens,
      signal: this.#abort.signal,
    });
    end();
    return release;
  }

  /** What speaks against the instance that it names. */
  #blame({ code, context }: PdError): void {
    if (code !== 'UPSTREAM_FAILED' && code !== 'UPSTREAM_TIMEOUT') return;
    const { registry } = this.#context;
    const instance = registry.list().find(({ httpAddress }) => httpAddress === context['peer']);
    if (instance) registry.breakerOf(instance)?.failed();
  }

  /** Notes what the pair is given until `over` is called, and decides whether its consumer needs the producer. */
  #placed(
    { producer, consumer }: InstancePair,
    body: RequestBody,
  ): PlacedPrompt & { readonly over: () => void } {
    const { caches, metrics, config } = this.#context;
    const left = body.tokens - caches.cached(consumer.httpAddress, body);
    const little = config.bypassTokens > 0 && left <= config.bypassTokens;
    const alone = little && body.prompts === 1 && consumer.fingerprint !== undefined;
    if (alone) metrics.bypassed.inc();
    const asked = alone ? [consumer] : [consumer, producer];
    let uncached = 0;
    for (const instance of asked) {
      const { role } = instance;
      const cached = caches.cached(instance.httpAddress, body);
      uncached = body.tokens - cached;
      metrics.placedTokens.inc({ role, cached: 'yes' }, cached);
      metrics.placedTokens.inc({ role, cached: 'no' }, uncached);
    }
    const overs = asked.map((instance) => caches.sent(instance, body));
    const over = () => {
      for (const each of overs) each();
    };
    return { alone, uncached, over };
  }

  #fail(error: PdError): void {
    const level = this.#clientGone || error.status < 500 ? 'info' : 'warn';
    const { route, out } = this.#received;
    this.#context.log[level]({ requestId: this.#requestId, code: error.code }, `${route}: ${error.message}`);
    answerError(out, error, this.#requestId);
  }
}

function single(header: string | string[] | undefined): string | undefined {
  return Array.isArray(header) ? header[0] : header;
}

/** Whose request it is, without keeping what it is known by. */
function keyOf(authorization: string | undefined): string {
  return authorization === undefined ? '' : hash('sha256', authorization, 'base64');
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
