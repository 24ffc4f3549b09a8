/**
 * What the instances of a pair are told about a request's KV, apart from the request itself. Each notice is sent once, with a short
 * deadline, and only to workers of ours: one that is lost costs time or memory until the worker's own deadline, nothing else.
 */
import { type ErrorData, PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import type { Instance, InstancePair } from './registry.ts';
import type { Upstream } from './upstream.ts';

const TIMEOUT_MS = 2_000;

/** The request, as notices name it. */
interface NoticeSubject {
  readonly requestId: string;
  readonly route: string;
  /** How many prompts it has; each has KV of its own. */
  readonly prompts: number;
}

/** Notices of one request to one pair. Every method returns at once. */
export class Notices {
  readonly #upstream: Upstream;
  readonly #log: Logger;
  readonly #pair: InstancePair;
  readonly #subject: NoticeSubject;

  constructor(upstream: Upstream, log: Logger, pair: InstancePair, subject: NoticeSubject) {
    this.#upstream = upstream;
    this.#log = log;
    this.#pair = pair;
    this.#subject = subject;
  }

  /**
   * This pair will not decode the request: its KV is freed now rather than at the orphan deadline (60 s by default). `except`: an instance
   * that has just refused a connection.
   */
  release(except?: Instance): void {
    for (const instance of [this.#pair.producer, this.#pair.consumer]) {
      // vLLM's workers have no such route.
      if (instance.fingerprint && instance !== except) this.#post(instance, '/kv/release');
    }
  }

  /** The prompt has been computed: from now on the consumer waits only for KV that is on its way. */
  prefilled(): void {
    this.#post(this.#pair.consumer, '/kv/prefilled');
  }

  /** The producer could not send the KV: the consumer computes the prompt itself, or fails, at once. */
  failed(error: ErrorData): void {
    const { consumer } = this.#pair;
    if (consumer.fingerprint) this.#post(consumer, '/kv/failed', { error });
  }

  #post(instance: Instance, path: string, more: object = {}): void {
    const { requestId, route, prompts } = this.#subject;
    const call = { instance, what: path, timeoutMs: TIMEOUT_MS, timeoutName: 'fixed' };
    this.#upstream
      .ask(call, {
        path,
        headers: { 'content-type': 'application/json', 'x-request-id': requestId },
        body: JSON.stringify({ request_id: requestId, route, prompts, ...more }),
        signal: AbortSignal.timeout(TIMEOUT_MS),
      })
      .then((response) => response.dump())
      .catch((error: unknown) => this.#log.debug({ requestId }, PdError.from(error).message));
  }
}
