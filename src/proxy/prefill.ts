/** The producer's part of a request: the copy of it, to the end of the answer. */
import { reasonOf } from '../net/resolve.ts';
import { KV_FAILED_HEADER, readKvFailed } from '../wire/overlap.ts';
import { deadlineWithin } from './deadline.ts';
import { type Attempt, type ForwardParts, MAX_ERROR_BODY } from './exchange.ts';
import { prefillCopy } from './prefill-copy.ts';
import { tellFailed } from './release.ts';
import { InstanceRefused, timeoutError } from './upstream.ts';
import { isDraining, type WholeAnswer, wholeAnswer } from './whole-answer.ts';

/** Resolves once the producer is done; with its answer where that is an error, which is the client's then. Throws the signal's reason. */
export async function prefill(
  parts: ForwardParts,
  { exchange, pair, requestId, headers }: Attempt,
  signal: AbortSignal,
): Promise<WholeAnswer | undefined> {
  const { upstream, metrics, log, prefills, prefillTimeoutMs } = parts;
  const { producer } = pair;
  const what = `prefill of ${exchange.route}`;
  const started = performance.now();
  const leave = prefills.enter(producer);
  const deadline = deadlineWithin(signal, prefillTimeoutMs, () =>
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
    const failure = readKvFailed(response.headers[KV_FAILED_HEADER]);
    if (failure) {
      const { route, json } = exchange;
      log.warn({ requestId, code: failure.code }, `${what}: its KV could not be sent: ${failure.message}`);
      tellFailed(upstream, log, { pair, requestId, route, json }, failure);
    }
    return undefined;
  } finally {
    deadline.clear();
    leave();
  }
}
