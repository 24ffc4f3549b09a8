/**
 * What `GET /v1/requests/ID/route` answers (docs/routing.md, "Receipts"): a receipt as JSON, and what the workers of its attempts know of it,
 * who are asked for that now. Times are milliseconds, `at_ms` since the request came.
 */
import type { Compared } from './placement.ts';
import type { AttemptReceipt, Receipt } from './receipts.ts';
import type { Instance, InstanceRole } from './registry.ts';
import type { Upstream } from './upstream.ts';

/** For a worker to tell what it knows. */
const WORKER_MS = 1_000;
/** Of that, bytes. */
const MOST_TOLD = 1_024 * 1_024;

/** `upstream`: absent where the workers are not asked. */
export async function routeOf(receipt: Receipt, upstream?: Upstream) {
  const { receivedAt, readAt, placedAt, endedAt, queuedMs, attempts } = receipt;
  return {
    id: receipt.id,
    object: 'request.route',
    route: receipt.route,
    model: receipt.model ?? null,
    /** Of OpenTelemetry, where one is made. */
    trace_id: receipt.trace?.traceId ?? null,
    /** Name of the key that it came with. */
    key: receipt.holder ?? null,
    received: new Date(receipt.receivedEpochMs).toISOString(),
    /** Of the answer; null while it is under way. 499: the client went away. */
    status: endedAt > 0 ? receipt.status : null,
    error: receipt.code ?? null,
    prompt: {
      prompts: receipt.prompts,
      tokens: receipt.promptTokens,
      /** False: guessed from the length of the body. */
      counted: receipt.tokensKnown,
    },
    ms: {
      read: between(receivedAt, readAt),
      queue: placedAt > 0 ? rounded(queuedMs) : null,
      placement: placedAt > 0 ? rounded(placedAt - readAt - queuedMs) : null,
      total: between(receivedAt, endedAt),
    },
    attempts: await Promise.all(attempts.map((attempt) => attemptOf(receipt, attempt, upstream))),
  };
}

async function attemptOf(receipt: Receipt, attempt: AttemptReceipt, upstream: Upstream | undefined) {
  const { requestId, placement, native, overlapped, at, refusedBy, failure } = attempt;
  const { alone, early } = placement;
  const since = (ms: number) => between(receipt.receivedAt, ms);
  const asked = Math.max(at.prefilled, at.decode);
  const [producer, consumer] = await Promise.all([
    instanceOf('producer', receipt, attempt, upstream),
    instanceOf('consumer', receipt, attempt, upstream),
  ]);
  return {
    request_id: requestId,
    producer,
    consumer,
    /** The consumer computed it, and the producer was not asked (--bypass-tokens, --bypass-wait). */
    alone,
    /** The producer was not busy, so its consumer might be asked at once; and it was. */
    producer_free: early,
    asked_early: overlapped,
    wire: alone ? null : native ? 'native' : 'frozen',
    outcome:
      at.end === 0 ? 'under_way' : refusedBy ? 'refused' : failure === undefined ? 'answered' : 'failed',
    refused_by: refusedBy ?? null,
    reason: failure ?? null,
    at_ms: {
      prefill: since(at.prefill),
      prefilled: since(at.prefilled),
      decode: since(at.decode),
      answered: since(at.answered),
      first_event: since(at.relayed),
      end: since(at.end),
    },
    ms: {
      /** From asking the producer to the end of its answer. */
      prefill: between(at.prefill, at.prefilled),
      /** From then, or from asking the consumer, to the first event. Null for an answer that is not streamed: it is part of `decode`. */
      hand_over: alone ? null : between(asked, at.relayed),
      decode: between(at.relayed > 0 ? at.relayed : asked, at.end),
    },
  };
}

async function instanceOf(
  role: InstanceRole,
  receipt: Receipt,
  attempt: AttemptReceipt,
  upstream: Upstream | undefined,
) {
  const { pair, choices, cachedTokens } = attempt.placement;
  const instance = pair[role];
  const choice = choices[role];
  return {
    http_address: instance.httpAddress,
    zmq_address: instance.zmqAddress,
    /** Of the prompt, that it was thought to have. */
    cached_tokens: cachedTokens[role],
    policy: choice?.policy ?? null,
    /** How many there were to choose from, of which the first are told. */
    considered: choice?.considered ?? 0,
    candidates: choice?.candidates.map(candidateOf) ?? [],
    worker: upstream ? await told(instance, receipt, attempt, upstream) : null,
  };
}

function candidateOf({ address, costMs, cachedTokens }: Compared) {
  return {
    http_address: address,
    /** The least was taken. Null where the policy does not compare them. */
    cost_ms: costMs === undefined ? null : rounded(costMs),
    cached_tokens: cachedTokens ?? null,
  };
}

/** What that worker knows of the request (POST /kv/receipt); null where it is none of ours, was not asked, or does not answer. */
async function told(
  instance: Instance,
  { route, prompts }: Receipt,
  { requestId, at }: AttemptReceipt,
  upstream: Upstream,
): Promise<unknown> {
  const askedAt = instance.role === 'producer' ? at.prefill : at.decode;
  if (!instance.fingerprint || askedAt === 0) return null;
  const asked = { most: MOST_TOLD, json: { request_id: requestId, route, prompts } };
  try {
    const { response, body } = await upstream.inquire(instance, '/kv/receipt', WORKER_MS, asked);
    if (response.statusCode !== 200) return null;
    return JSON.parse(body.toString('utf8')) as unknown;
  } catch {
    // Gone, late, or not what it says it is: the receipt does without.
    return null;
  }
}

function between(from: number, to: number): number | null {
  return from > 0 && to > 0 ? Math.max(0, rounded(to - from)) : null;
}

function rounded(ms: number): number {
  return Math.round(ms * 1_000) / 1_000;
}
