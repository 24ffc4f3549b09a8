/**
 * Producer and consumer asked at once: the consumer parses, tokenizes, schedules and asks for the KV while the prompt is computed.
 *
 *   producer  ok              the consumer's answer is waited for, as if it had been asked now
 *             error, refused  the consumer is given up; the client's answer, or another pair's turn
 *   consumer  2xx             it has the KV, so nothing the producer says matters any more: passed on at once
 *             4xx             the request is at fault: passed on, the prefill given up
 *             5xx             may be the producer's doing, so its answer goes first
 *             refused         the prefill is given up; another pair's turn
 */
import { PdError } from '../errors.ts';
import { PREFILL_WITHIN_HEADER } from '../wire/overlap.ts';
import { askConsumer, decodeTimeout, errorAnswer, passOn } from './decode.ts';
import type { Attempt, Exchange, ForwardParts } from './exchange.ts';
import { prefill } from './prefill.ts';
import type { Pair } from './registry.ts';
import { isEventStream } from './relay.ts';
import { countPrompts, tellPrefilled } from './release.ts';
import type { UpstreamResponse } from './upstream.ts';
import { answerWith } from './whole-answer.ts';

/**
 * KV that is on its way comes sooner; a consumer that still has none is told then that the prompt is computed. It is told again after twice
 * the time, and so on: one that missed it would wait for as long as prefill may take.
 */
const NOTICE_MS = 250;
/** For the producer's answer, once the client has all of the consumer's. */
const GRACE_MS = 2_000;

/** How a promise ended. It never rejects, so that it can be left alone. */
type Settled<T> = { readonly ok: true; readonly value: T } | { readonly ok: false; readonly error: unknown };

/** Both know how, and one answer stands on one prompt: with several the first may be told before the last is computed. */
export function mayOverlap({ producer, consumer }: Pair, { json }: Exchange): boolean {
  return producer.overlaps === true && consumer.overlaps === true && countPrompts(json['prompt']) === 1;
}

/** False where KV may be left that nobody decodes. Throws InstanceRefused only while nothing has been passed on. */
export async function overlapped(parts: ForwardParts, attempt: Attempt): Promise<boolean> {
  const { exchange, requestId } = attempt;
  const giveUpPrefill = new AbortController();
  const giveUpDecode = new AbortController();
  const prefilling = settled(
    prefill(parts, attempt, AbortSignal.any([exchange.signal, giveUpPrefill.signal])),
  );
  const headers = { ...attempt.headers, [PREFILL_WITHIN_HEADER]: String(parts.prefillTimeoutMs) };
  const decodeSignal = AbortSignal.any([exchange.signal, giveUpDecode.signal]);
  const asking = settled(askConsumer(parts, { ...attempt, headers }, 0, decodeSignal));
  try {
    const first = await Promise.race([asking.then(() => 'consumer'), prefilling.then(() => 'producer')]);
    if (first === 'producer') {
      const refusal = valueIn(await prefilling);
      if (refusal) {
        answerWith(refusal, exchange.out, requestId);
        return false;
      }
      return await passOn(parts, attempt, await headOf(parts, attempt, asking, giveUpDecode));
    }
    const response = valueIn(await asking);
    if (response.statusCode >= 500 && !isEventStream(response)) {
      const answer = await errorAnswer(parts, attempt, response);
      answerWith(valueIn(await prefilling) ?? answer, exchange.out, requestId);
      return false;
    }
    if (response.statusCode >= 400) giveUpPrefill.abort(over());
    const decoded = await passOn(parts, attempt, response);
    if (decoded) await lastWords(parts, attempt, prefilling);
    return decoded;
  } finally {
    giveUpPrefill.abort(over());
    giveUpDecode.abort(over());
  }
}

/** The head of the consumer's answer after the producer's. */
async function headOf(
  parts: ForwardParts,
  attempt: Attempt,
  asking: Promise<Settled<UpstreamResponse>>,
  giveUp: AbortController,
): Promise<UpstreamResponse> {
  const { upstream, log, decodeIdleTimeoutMs } = parts;
  const { exchange, pair, requestId } = attempt;
  const { route, json } = exchange;
  let pauseMs = NOTICE_MS;
  const tell = () => {
    tellPrefilled(upstream, log, { pair, requestId, route, json });
    pauseMs *= 2;
    notice = setTimeout(tell, pauseMs);
  };
  let notice = setTimeout(tell, pauseMs);
  const late = setTimeout(() => giveUp.abort(decodeTimeout(parts, attempt)), decodeIdleTimeoutMs);
  try {
    return valueIn(await asking);
  } finally {
    clearTimeout(notice);
    clearTimeout(late);
  }
}

/** The client has its answer; what becomes of the producer's is for the log. */
async function lastWords(
  { log }: ForwardParts,
  { exchange, requestId }: Attempt,
  prefilling: Promise<Settled<unknown>>,
): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<Settled<unknown>>((resolve) => {
    const error = new PdError('UPSTREAM_TIMEOUT', `nothing within ${GRACE_MS} ms of the consumer's answer`);
    timer = setTimeout(() => resolve({ ok: false, error }), GRACE_MS);
  });
  const end = await Promise.race([prefilling, late]);
  clearTimeout(timer);
  if (end.ok && end.value === undefined) return;
  const { code, message } = end.ok
    ? new PdError('UPSTREAM_FAILED', 'the producer answered with an error')
    : PdError.from(end.error);
  log.info({ requestId, code }, `prefill of ${exchange.route}, after its decode: ${message}`);
}

function settled<T>(promise: Promise<T>): Promise<Settled<T>> {
  return promise.then(
    (value): Settled<T> => ({ ok: true, value }),
    (error: unknown): Settled<T> => ({ ok: false, error }),
  );
}

function valueIn<T>(end: Settled<T>): T {
  if (end.ok) return end.value;
  throw end.error;
}

function over(): PdError {
  return new PdError('REQUEST_ABORTED', 'the other end of the pair has decided the request');
}
