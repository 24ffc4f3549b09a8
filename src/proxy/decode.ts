/** The consumer's part of a request: the original, and its answer on to the client. */
import { PdError } from '../errors.ts';
import { type Attempt, type ForwardParts, MAX_ERROR_BODY } from './exchange.ts';
import { isEventStream, relay } from './relay.ts';
import { InstanceRefused, timeoutError, type UpstreamResponse } from './upstream.ts';
import { answerWith, isDraining, type WholeAnswer, wholeAnswer } from './whole-answer.ts';

const TIMEOUT_NAME = '--decode-idle-timeout';

const whatOf = ({ exchange }: Attempt) => `decode of ${exchange.route}`;

/** Resolves with the head of its answer, which comes within `headersTimeoutMs` (0: the signal's owner watches). */
export function askConsumer(
  { upstream }: ForwardParts,
  attempt: Attempt,
  headersTimeoutMs: number,
  signal: AbortSignal,
): Promise<UpstreamResponse> {
  const { exchange, pair, headers } = attempt;
  return upstream.ask({
    instance: pair.consumer,
    path: exchange.route,
    what: whatOf(attempt),
    headers,
    body: exchange.body,
    headersTimeoutMs,
    timeoutName: TIMEOUT_NAME,
    signal,
  });
}

/** Nothing came for `--decode-idle-timeout`. */
export function decodeTimeout({ decodeIdleTimeoutMs }: ForwardParts, attempt: Attempt) {
  return timeoutError(attempt.pair.consumer, whatOf(attempt), decodeIdleTimeoutMs, TIMEOUT_NAME);
}

/** An error answer to its end. Throws InstanceRefused where the consumer is stopping. */
export async function errorAnswer(
  parts: ForwardParts,
  attempt: Attempt,
  response: UpstreamResponse,
): Promise<WholeAnswer> {
  const timer = setTimeout(
    () => response.body.destroy(decodeTimeout(parts, attempt)),
    parts.decodeIdleTimeoutMs,
  );
  const answer = await wholeAnswer(response, MAX_ERROR_BODY)
    .catch((error: unknown) => {
      throw PdError.from(error, 'UPSTREAM_FAILED', { peer: attempt.pair.consumer.httpAddress });
    })
    .finally(() => clearTimeout(timer));
  if (isDraining(answer)) throw new InstanceRefused(attempt.pair.consumer, whatOf(attempt), 'it is stopping');
  return answer;
}

/** False where the consumer answered with an error. Throws InstanceRefused, with nothing passed on, where it is stopping. */
export async function passOn(
  parts: ForwardParts,
  attempt: Attempt,
  response: UpstreamResponse,
): Promise<boolean> {
  const { metrics, decodeIdleTimeoutMs } = parts;
  const { exchange, pair, requestId } = attempt;
  if (response.statusCode === 503 && !isEventStream(response)) {
    answerWith(await errorAnswer(parts, attempt, response), exchange.out, requestId);
    return false;
  }
  await relay(response, exchange.out, {
    instance: pair.consumer,
    what: whatOf(attempt),
    requestId,
    idleMs: decodeIdleTimeoutMs,
    timeoutName: TIMEOUT_NAME,
    signal: exchange.signal,
    onFirstEvent: () => metrics.firstEventSeconds.observe((performance.now() - exchange.arrivedMs) / 1_000),
  });
  return response.statusCode < 400;
}
