/**
 * Waiting for device events without blocking the thread. Polls with setImmediate only while something is in flight: a timer has a resolution
 * of about 1 ms, longer than most transfers take, and a loop that always polls would occupy a core.
 */
import { PdError } from '../errors.ts';
import type { DeviceEvent, Stream } from './device.ts';

/** Looks once. False: it is done and wants no more turns. */
export type Poll = (now: number) => boolean;

/** One setImmediate chain while something is in flight, nothing at all while idle. */
export class PollLoop {
  readonly #polls = new Set<Poll>();
  readonly #now: () => number;
  #scheduled = false;

  constructor(now: () => number = () => performance.now()) {
    this.#now = now;
  }

  /** `poll` gets its turns from now on. It must not throw. Adding it again changes nothing. */
  add(poll: Poll): void {
    this.#polls.add(poll);
    this.#schedule();
  }

  delete(poll: Poll): void {
    this.#polls.delete(poll);
  }

  #schedule(): void {
    if (this.#scheduled || this.#polls.size === 0) return;
    this.#scheduled = true;
    setImmediate(() => {
      this.#scheduled = false;
      const now = this.#now();
      for (const poll of [...this.#polls]) if (!poll(now)) this.#polls.delete(poll);
      this.#schedule();
    });
  }
}

export class EventPoller {
  /** How to reject each wait that has not settled. */
  readonly #waits = new Map<Poll, (reason: PdError) => void>();
  readonly #now: () => number;
  readonly #loop: PollLoop;
  #closed: PdError | undefined;

  constructor(now: () => number = () => performance.now()) {
    this.#now = now;
    this.#loop = new PollLoop(now);
  }

  /** Waits that have not settled. */
  get pending(): number {
    return this.#waits.size;
  }

  /**
   * Resolves when the event has fired; at once, without a poll, if it already has. Rejects with TRANSFER_TIMEOUT after `timeoutMs`,
   * with what `event.done()` throws, or with the reason of `dispose`. The caller disposes the event.
   */
  wait(event: DeviceEvent, timeoutMs: number, what: string): Promise<void> {
    if (this.#closed) return Promise.reject(this.#closed);
    const deadline = this.#now() + timeoutMs;
    return new Promise((resolve, reject) => {
      const poll = (now: number) => {
        try {
          // Also polled once after the deadline: a busy thread must not fail work that is done.
          if (event.done()) resolve();
          else if (now < deadline) return true;
          else
            reject(
              new PdError('TRANSFER_TIMEOUT', `${what}: the device did not finish within ${timeoutMs} ms`),
            );
        } catch (error) {
          reject(PdError.from(error));
        }
        this.#waits.delete(poll);
        return false;
      };
      if (!poll(Number.NEGATIVE_INFINITY)) return;
      this.#waits.set(poll, reject);
      this.#loop.add(poll);
    });
  }

  /** Waits for all work enqueued on `stream` so far. */
  async drained(stream: Pick<Stream, 'record'>, timeoutMs: number, what: string): Promise<void> {
    const event = stream.record();
    try {
      await this.wait(event, timeoutMs, what);
    } finally {
      event.dispose();
    }
  }

  /** Rejects all that waits, and every later wait. Idempotent. */
  dispose(reason: PdError = new PdError('ENGINE_CLOSED', 'the event poller has been disposed')): void {
    this.#closed ??= reason;
    for (const [poll, reject] of this.#waits) {
      this.#loop.delete(poll);
      reject(this.#closed);
    }
    this.#waits.clear();
  }
}
