/**
 * Requests begin in turns, where many come at once: each turn of the event loop reads so many bodies, and the others wait for the next ones.
 * For in each turn libuv takes up one new connection and relays what has come meanwhile: with all that is there read in one turn, sixty
 * clients that came together waited for each other's bodies, the last of them for a second, and streams with them.
 */

/** Read in one turn, bytes: some milliseconds, with what follows. */
const TURN_BYTES = 131_072;
/** What follows takes its time for a short one, too. */
const LEAST_BYTES = 16_384;

export class ReadingTurns {
  readonly #waiting: { readonly bytes: number; readonly begin: () => void }[] = [];
  /** Of this turn. */
  #left = 0;
  /** There will be a next one. */
  #goesOn = false;

  /** To be awaited before a body of so many bytes is read; undefined: it may be at once. */
  begin(bytes: number): Promise<void> | undefined {
    if (!this.#goesOn) {
      this.#goesOn = true;
      this.#left = TURN_BYTES;
      setImmediate(() => this.#next());
    }
    const counted = Math.max(LEAST_BYTES, bytes);
    if (this.#left > 0 && this.#waiting.length === 0) {
      this.#left -= counted;
      return undefined;
    }
    return new Promise((begin) => this.#waiting.push({ bytes: counted, begin }));
  }

  #next(): void {
    this.#goesOn = this.#waiting.length > 0;
    if (this.#goesOn) setImmediate(() => this.#next());
    this.#left = TURN_BYTES;
    while (this.#left > 0 && this.#waiting.length > 0) {
      const { bytes, begin } = this.#waiting.shift()!;
      this.#left -= bytes;
      begin();
    }
  }
}
