/** A queue between a producer that pushes and one consumer that iterates. Ends or fails once; what was pushed before is still read. */
export class AsyncQueue<T> implements AsyncIterableIterator<T> {
  readonly #items: T[] = [];
  #waiting: { resolve: (result: IteratorResult<T>) => void; reject: (error: unknown) => void } | undefined;
  #end: { readonly error?: unknown } | undefined;
  readonly #onReturn: () => void;

  /** `onReturn` is called when the consumer leaves before the end. */
  constructor(onReturn: () => void = () => {}) {
    this.#onReturn = onReturn;
  }

  push(item: T): void {
    if (this.#end) return;
    const waiting = this.#waiting;
    this.#waiting = undefined;
    if (waiting) waiting.resolve({ value: item, done: false });
    else this.#items.push(item);
  }

  end(): void {
    this.#finish({});
  }

  /** The consumer's next read after what is queued throws `error`. */
  fail(error: unknown): void {
    this.#finish({ error });
  }

  #finish(end: { readonly error?: unknown }): void {
    if (this.#end) return;
    this.#end = end;
    const waiting = this.#waiting;
    this.#waiting = undefined;
    if (!waiting) return;
    if ('error' in end) waiting.reject(end.error);
    else waiting.resolve({ value: undefined, done: true });
  }

  next(): Promise<IteratorResult<T>> {
    if (this.#items.length > 0) return Promise.resolve({ value: this.#items.shift()!, done: false });
    const end = this.#end;
    if (!end) return new Promise((resolve, reject) => (this.#waiting = { resolve, reject }));
    this.#end = {}; // an error is thrown once
    return 'error' in end ? Promise.reject(end.error) : Promise.resolve({ value: undefined, done: true });
  }

  return(): Promise<IteratorResult<T>> {
    if (!this.#end) {
      this.#onReturn();
      this.end();
    }
    this.#items.length = 0;
    return Promise.resolve({ value: undefined, done: true });
  }

  [Symbol.asyncIterator](): this {
    return this;
  }
}
