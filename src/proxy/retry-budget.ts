/** How much of what this proxy does may be trying again, so that instances that fail are not buried under retries. Pure. */

/** Of the requests: a fifth. */
const SHARE = 0.2;
/** Retries that may be saved up, and that there are at first. */
const MOST = 50;
/** Of one request. */
export const MOST_RETRIES = 3;
const BACKOFF_MS = 25;

export class RetryBudget {
  #left = MOST;

  /** A request has come. */
  earn(): void {
    this.#left = Math.min(MOST, this.#left + SHARE);
  }

  /** False where no retry is left. */
  spend(): boolean {
    if (this.#left < 1) return false;
    this.#left--;
    return true;
  }
}

/** Before the retry of that number, from 1: none before the first, then at random up to 25, 50, 100 ms. `random`: 0 to 1. */
export function backoffMs(retry: number, random: number = Math.random()): number {
  return retry <= 1 ? 0 : random * BACKOFF_MS * 2 ** (retry - 2);
}
