/**
 * What the instances of a pair are told about a request's KV, apart from the request itself. Each notice is sent once, with a short
 * deadline, and only to workers of ours: one that is lost costs time or memory until the worker's own deadline, nothing else.
 */
import { type ErrorData, PdError } from '../errors.ts';
import type { Logger } from '../observability/log.ts';
import type { Instance, InstancePair } from './registry.ts';
import type { Upstream } from './upstream.ts';

const TIMEOUT_MS = 2_000;
/**
 * KV that is on its way comes sooner; a consumer that still has none is told then that the prompt has been computed. It is told again
 * after twice the time, and so on: one that missed the notice would wait as long as prefill may take.
 */
const FIRST_MS = 250;

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

  /**
   * The prompt has been computed: from now on the consumer waits only for KV that is on its way. It is told so again and again, until what
   * this returns is called.
   */
  prefilled(): () => void {
    let pauseMs = FIRST_MS;
    const tell = () => {
      this.#post(this.#pair.consumer, '/kv/prefilled');
      pauseMs *= 2;
      timer = setTimeout(tell, pauseMs);
    };
    let timer = setTimeout(tell, pauseMs);
    return () => clearTimeout(timer);
  }

  /** The producer could not send the KV: the consumer computes the prompt itself, or fails, at once. */
  failed(error: ErrorData): void {
    const { consumer } = this.#pair;
    if (consumer.fingerprint) this.#post(consumer, '/kv/failed', { error });
  }

  #post(instance: Instance, path: string, more: object = {}): void {
    const { requestId, route, prompts } = this.#subject;
    this.#upstream
      .inquire(instance, path, TIMEOUT_MS, {
        headers: { 'x-request-id': requestId },
        json: { request_id: requestId, route, prompts, ...more },
      })
      .catch((error: unknown) => this.#log.debug({ requestId }, PdError.from(error).message));
  }
}
