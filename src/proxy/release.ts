/**
 * Tells both ends of a pair that a request will not be decoded there, so that its KV is freed at once and not as an orphan (60 s by
 * default). A kindness, not a duty: it is asked once, briefly, and only of instances of ours; what it misses the workers free in time.
 */
import { PdError } from '../errors.ts';
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

/** Returns at once. `except`: an instance that has just refused a connection. */
export function releaseKv(upstream: Upstream, log: Logger, given: Given, except?: Instance): void {
  const { pair, requestId, route, json } = given;
  const body = JSON.stringify({ request_id: requestId, route, prompts: countPrompts(json['prompt']) });
  for (const instance of [pair.producer, pair.consumer]) {
    // vLLM's workers have no such route.
    if (!instance.fingerprint || instance === except) continue;
    upstream
      .ask({
        instance,
        path: '/kv/release',
        what: 'release of KV',
        headers: { 'content-type': 'application/json', 'x-request-id': requestId },
        body,
        headersTimeoutMs: TIMEOUT_MS,
        timeoutName: 'release',
        signal: AbortSignal.timeout(TIMEOUT_MS),
      })
      .then((response) => response.body.dump())
      .catch((error: unknown) => log.debug({ requestId }, PdError.from(error).message));
  }
}

function countPrompts(prompt: unknown): number {
  const many = Array.isArray(prompt) && typeof prompt[0] !== 'number';
  return many ? Math.max(1, prompt.length) : 1;
}
