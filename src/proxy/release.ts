/**
 * What a pair is told of a request's KV, beside the request itself. A kindness, not a duty: it is said with a short deadline, and only to
 * instances of ours; what it misses the workers' own deadlines mend.
 */
import { type ErrorData, PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import type { JsonObject } from './prefill-copy.ts';
import type { Instance, Pair } from './registry.ts';
import type { Upstream } from './upstream.ts';

const TIMEOUT_MS = 2_000;

export interface Given {
  readonly pair: Pair;
  readonly requestId: string;
  readonly route: string;
  readonly json: JsonObject;
}

/**
 * The request will not be decoded there: its KV is freed at once and not as an orphan (60 s by default). Returns at once. `except`: an
 * instance that has just refused a connection.
 */
export function releaseKv(upstream: Upstream, log: Logger, given: Given, except?: Instance): void {
  for (const instance of [given.pair.producer, given.pair.consumer]) {
    // vLLM's workers have no such route.
    if (instance.fingerprint && instance !== except) tell(upstream, log, given, instance, '/kv/release');
  }
}

/** Its prompt is computed: the consumer waits no longer than for KV that is on its way. Returns at once. */
export function tellPrefilled(upstream: Upstream, log: Logger, given: Given): void {
  tell(upstream, log, given, given.pair.consumer, '/kv/prefilled');
}

/** The producer could not send its KV: the consumer computes the prompt, or fails, at once. Returns at once. */
export function tellFailed(upstream: Upstream, log: Logger, given: Given, error: ErrorData): void {
  const { consumer } = given.pair;
  if (consumer.fingerprint) tell(upstream, log, given, consumer, '/kv/failed', { error });
}

export function countPrompts(prompt: unknown): number {
  const many = Array.isArray(prompt) && typeof prompt[0] !== 'number';
  return many ? Math.max(1, prompt.length) : 1;
}

function tell(
  upstream: Upstream,
  log: Logger,
  given: Given,
  instance: Instance,
  path: string,
  more: object = {},
): void {
  const { requestId, route, json } = given;
  upstream
    .ask({
      instance,
      path,
      what: path,
      headers: { 'content-type': 'application/json', 'x-request-id': requestId },
      body: JSON.stringify({ request_id: requestId, route, prompts: countPrompts(json['prompt']), ...more }),
      headersTimeoutMs: TIMEOUT_MS,
      timeoutName: 'fixed',
      signal: AbortSignal.timeout(TIMEOUT_MS),
    })
    .then((response) => response.body.dump())
    .catch((error: unknown) => log.debug({ requestId }, PdError.from(error).message));
}
