import { setMaxListeners } from 'node:events';

/** A promise and the functions that settle it (Promise.withResolvers, which Node 20 lacks). */
export interface Deferred<T> {
  readonly promise: Promise<T>;
  readonly resolve: (value: T) => void;
  readonly reject: (reason: unknown) => void;
}

export function deferred<T>(): Deferred<T> {
  let resolve: Deferred<T>['resolve'] | undefined;
  let reject: Deferred<T>['reject'] | undefined;
  const promise = new Promise<T>((onResolve, onReject) => {
    resolve = onResolve;
    reject = onReject;
  });
  return { promise, resolve: resolve!, reject: reject! };
}

/** What `promise` settles with, or undefined after `ms` milliseconds. */
export async function withDeadline<T>(promise: Promise<T>, ms: number): Promise<T | undefined> {
  let timer: NodeJS.Timeout | undefined;
  const deadline = new Promise<undefined>((resolve) => {
    timer = setTimeout(() => resolve(undefined), ms);
  });
  try {
    return await Promise.race([promise, deadline]);
  } finally {
    clearTimeout(timer);
  }
}

/** What this code asks of an AbortSignal; a Cancellation has it, too. */
export interface Signal {
  readonly aborted: boolean;
  readonly reason: unknown;
  throwIfAborted(): void;
  addEventListener(type: 'abort', listener: () => void, options?: { readonly once: true }): void;
  removeEventListener(type: 'abort', listener: () => void): void;
}

/** Controller and signal in one. An AbortController with one listener takes some 5 microseconds, and a proxied request has several. */
export class Cancellation implements Signal {
  #aborted = false;
  #reason: unknown;
  /** In the order in which they are called; the first by itself, as there is seldom another. */
  #listener: (() => void) | undefined;
  #more: (() => void)[] = [];

  get aborted(): boolean {
    return this.#aborted;
  }

  get reason(): unknown {
    return this.#reason;
  }

  throwIfAborted(): void {
    if (this.#aborted) throw this.#reason;
  }

  /** Each listener is called once. One that is added afterwards is never called, as with an AbortSignal. */
  addEventListener(_type: 'abort', listener: () => void): void {
    if (!this.#listener) this.#listener = listener;
    else this.#more.push(listener);
  }

  removeEventListener(_type: 'abort', listener: () => void): void {
    if (this.#listener === listener) this.#listener = this.#more.shift();
    else this.#more = this.#more.filter((other) => other !== listener);
  }

  /** Only the first reason counts. */
  abort(reason: unknown): void {
    if (this.#aborted) return;
    this.#aborted = true;
    this.#reason = reason;
    const listeners = [this.#listener, ...this.#more];
    this.#listener = undefined;
    this.#more = [];
    for (const listener of listeners) listener?.();
  }
}

/**
 * Aborted as `signal` is, or after `ms` with a TimeoutError. AbortSignal.any([AbortSignal.timeout(ms), signal]) is no substitute: Node lets go of a
 * timeout that only another signal has, which then never comes, and keeps some bytes of each for as long as `signal` lives.
 */
export function within(ms: number, signal?: AbortSignal): AbortSignal {
  const bound = new AbortController();
  const end = () => {
    clearTimeout(timer);
    bound.abort(signal?.reason);
  };
  const timer = setTimeout(() => {
    signal?.removeEventListener('abort', end);
    bound.abort(new DOMException(`no answer within ${ms} ms`, 'TimeoutError'));
  }, ms).unref();
  if (signal?.aborted) end();
  else if (signal) {
    setMaxListeners(0, signal); // as many as there are questions under way
    signal.addEventListener('abort', end, { once: true });
  }
  return bound.signal;
}
