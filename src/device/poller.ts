/**
 * Waiting for device events without blocking the thread. Polls with setImmediate only while something is in flight: a timer ticks at
 * about 1 ms, longer than most transfers take, and a loop that always polls would take a core.
 */
import { PdError } from '../errors.ts';
import type { DeviceEvent } from './device.ts';

interface Wait {
  readonly event: DeviceEvent;
  readonly deadline: number;
  readonly timeoutMs: number;
  readonly what: string;
  readonly resolve: () => void;
  readonly reject: (error: PdError) => void;
}

export class EventPoller {
  #waits: Wait[] = [];
  #scheduled = false;
  #closed: PdError | undefined;
  readonly #now: () => number;

  constructor(now: () => number = () => performance.now()) {
    this.#now = now;
  }

  /** Waits that have not settled. */
  get pending(): number {
    return this.#waits.length;
  }

  /**
   * Resolves when the event has fired; at once, without a poll, where it already has. Rejects with TRANSFER_TIMEOUT after `timeoutMs`,
   * with what `event.done()` throws, or with the reason of `dispose`. The caller disposes the event.
   */
  wait(event: DeviceEvent, timeoutMs: number, what: string): Promise<void> {
    if (this.#closed) return Promise.reject(this.#closed);
    try {
      if (event.done()) return Promise.resolve();
    } catch (error) {
      return Promise.reject(PdError.from(error));
    }
    return new Promise((resolve, reject) => {
      this.#waits.push({ event, deadline: this.#now() + timeoutMs, timeoutMs, what, resolve, reject });
      this.#schedule();
    });
  }

  /** Rejects all that waits, and every later wait. Idempotent. */
  dispose(reason: PdError = new PdError('ENGINE_CLOSED', 'the event poller has been disposed')): void {
    this.#closed ??= reason;
    const waits = this.#waits;
    this.#waits = [];
    for (const wait of waits) wait.reject(this.#closed);
  }

  #schedule(): void {
    if (this.#scheduled || this.#waits.length === 0) return;
    this.#scheduled = true;
    setImmediate(() => {
      this.#scheduled = false;
      this.#poll();
      this.#schedule();
    });
  }

  #poll(): void {
    const now = this.#now();
    this.#waits = this.#waits.filter((wait) => !this.#settle(wait, now));
  }

  #settle(wait: Wait, now: number): boolean {
    try {
      if (wait.event.done()) {
        wait.resolve();
        return true;
      }
    } catch (error) {
      wait.reject(PdError.from(error));
      return true;
    }
    // The event is asked once more after the deadline has passed: a thread that was busy must not fail work that is done.
    if (now < wait.deadline) return false;
    wait.reject(
      new PdError('TRANSFER_TIMEOUT', `${wait.what}: the device did not finish within ${wait.timeoutMs} ms`),
    );
    return true;
  }
}
