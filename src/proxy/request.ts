/**
 * A client's request from its arrival to its answer: it goes to a pair, and to others where an instance does not take it. What
 * happens with one pair is in attempt.ts.
 */
import { hash } from 'node:crypto';
import { Cancellation } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { monotonicMs } from '../observability/timelines.ts';
import { Attempt, type ProxyContext, type ReceivedRequest } from './attempt.ts';
import type { RequestBody } from './body.ts';
import type { Visit, Wish } from './coordinator.ts';
import type { Receipt } from './receipts.ts';
import { instanceLabel } from './registry.ts';
import { answerError } from './relay.ts';
import { InstanceRefused } from './upstream.ts';

/** Classes on either side of 0; a priority beyond them counts as the last. */
const MOST_PRIORITY = 100;
/** nginx's number for a client that went away; only in logs and metrics. */
const CLIENT_GONE = 499;

export class ProxiedRequest {
  readonly #context: ProxyContext;
  readonly #received: ReceivedRequest;
  readonly #receipt: Receipt;
  /** Ends whatever is under way: the client has gone, or the proxy stops. */
  readonly #abort = new Cancellation();
  #clientGone = false;
  /** Of the last attempt, if there was one. */
  #requestId: string;

  constructor(context: ProxyContext, received: ReceivedRequest) {
    this.#context = context;
    this.#received = received;
    this.#receipt = context.receipts.begin(received.route, received.holder);
    this.#receipt.trace = context.traces?.begin(received.headers);
    this.#requestId = this.#receipt.id;
  }

  /** The proxy stops: what is under way is broken off. */
  abort(reason: PdError): void {
    this.#abort.abort(reason);
  }

  /** Answers in every case; never rejects. To be called once. */
  async answer(): Promise<void> {
    const { metrics, bodies, coordinator, receipts, traces } = this.#context;
    const signal = this.#abort;
    const receipt = this.#receipt;
    let error: PdError | undefined;
    const { route, body, out } = this.#received;
    out.once('close', () => {
      if (out.writableFinished) return;
      this.#clientGone = true;
      this.#abort.abort(new PdError('REQUEST_ABORTED', `${route}: the client went away`));
    });
    metrics.inFlight.inc();
    try {
      this.#refuseOwn();
      const read = await bodies.read(body, signal, coordinator.wanted, route);
      signal.throwIfAborted();
      receipt.readAt = monotonicMs();
      receipt.model = read.model;
      receipt.prompts = read.prompts;
      receipt.streamed = read.streamed;
      receipt.promptTokens = read.tokens;
      receipt.tokensKnown = read.tokensKnown;
      const visit = await coordinator.enter(this.#wish(read), signal);
      receipt.placedAt = monotonicMs();
      receipt.queuedMs = visit.queuedMs;
      try {
        await this.#throughPairs(read, visit);
      } finally {
        visit.end();
      }
    } catch (cause) {
      error = PdError.from(cause);
      this.#fail(error);
    } finally {
      const status = this.#clientGone ? CLIENT_GONE : out.statusCode;
      metrics.inFlight.dec();
      const tally = metrics.routeOf(route);
      tally.statuses.inc(status);
      receipts.end(receipt, status, error?.code);
      tally.seconds.observe((monotonicMs() - receipt.receivedAt) / 1_000);
      traces?.ended(receipt);
    }
  }

  /** One that this proxy has sent itself would be sent again, without end. */
  #refuseOwn(): void {
    const id = single(this.#received.headers['x-request-id']);
    const sent = id === undefined ? undefined : this.#context.receipts.get(id);
    if (!sent || sent.endedAt > 0) return;
    throw new PdError(
      'REQUEST_INVALID',
      `${id} is under way here: an instance of this proxy leads back to it`,
    );
  }

  #wish(prompt: RequestBody): Wish {
    const { headers, holder } = this.#received;
    const told = Number(single(headers['x-priority']) ?? prompt.priority);
    return {
      key: holder ?? keyOf(single(headers.authorization)),
      priority: Math.max(-MOST_PRIORITY, Math.min(MOST_PRIORITY, Number.isInteger(told) ? told : 0)),
      session: single(headers[this.#context.config.sessionHeader]) ?? prompt.user,
      prompt,
    };
  }

  async #throughPairs(body: RequestBody, visit: Visit): Promise<void> {
    const { log } = this.#context;
    const { holder } = this.#received;
    const request = { ...this.#received, body, receipt: this.#receipt, signal: this.#abort };
    for (;;) {
      const { producer, consumer } = visit.placement.pair;
      const attempt = new Attempt(this.#context, request, visit);
      const { requestId } = attempt;
      this.#requestId = requestId;
      log.info(
        { requestId, ...(holder !== undefined && { key: holder }) },
        `handle_request count: ${visit.count}, ${instanceLabel(producer)} 👉 ${instanceLabel(consumer)}`,
      );
      try {
        await attempt.run();
        return;
      } catch (cause) {
        const error = PdError.from(cause);
        if (!(error instanceof InstanceRefused)) {
          blame(error, visit);
          throw error;
        }
        const next = await visit.retry(error.instance.role);
        this.#abort.throwIfAborted();
        if (!next) throw error;
        log.warn({ requestId }, `${error.message}; trying another pair`);
      }
    }
  }

  #fail(error: PdError): void {
    const level = this.#clientGone || error.status < 500 ? 'info' : 'warn';
    const { route, out } = this.#received;
    this.#context.metrics.routeOf(route).errors.inc(error.code);
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

/** What speaks against the instance that it names. */
function blame({ code, context }: PdError, visit: Visit): void {
  if (code !== 'UPSTREAM_FAILED' && code !== 'UPSTREAM_TIMEOUT') return;
  const { placement } = visit;
  for (const { role, httpAddress } of Object.values(placement.pair))
    if (httpAddress === context['peer']) visit.judge(placement, role, false);
}
