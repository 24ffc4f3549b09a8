/**
 * Finds stop strings in text that comes in pieces. What could still become one is held back, so that no part of a stop string is
 * ever seen outside:
 *
 *   stop "END"    push "the E" -> "the "    push "ND of" -> "", matched    (or push "asy" -> "Easy")
 */
export class StopMatcher {
  readonly #stops: readonly string[];
  #held = '';
  #matched: string | undefined;

  constructor(stops: readonly string[]) {
    this.#stops = stops;
  }

  /** The stop string found, the earliest in the text. Nothing comes out after it. */
  get matched(): string | undefined {
    return this.#matched;
  }

  /** Text that is certain to stand before any stop string. */
  push(text: string): string {
    if (this.#matched !== undefined) return '';
    if (this.#stops.length === 0) return text;
    const all = this.#held + text;
    let end = -1;
    for (const stop of this.#stops) {
      const at = all.indexOf(stop);
      if (at >= 0 && (end < 0 || at < end)) {
        end = at;
        this.#matched = stop;
      }
    }
    if (end >= 0) {
      this.#held = '';
      return all.slice(0, end);
    }
    const keep = this.#partialEnd(all);
    this.#held = all.slice(all.length - keep);
    return all.slice(0, all.length - keep);
  }

  /** The text is over: what was held back is no stop string. */
  flush(): string {
    const held = this.#held;
    this.#held = '';
    return held;
  }

  /** Length of the longest end of `text` that some stop string begins with. */
  #partialEnd(text: string): number {
    let longest = 0;
    for (const stop of this.#stops) {
      for (let length = Math.min(stop.length - 1, text.length); length > longest; length--) {
        if (text.endsWith(stop.slice(0, length))) {
          longest = length;
          break;
        }
      }
    }
    return longest;
  }
}
