/**
 * What a model's text says, as clients are told: thoughts, content, calls of tools. Parsers take the text in pieces and say what has become
 * certain; joined, that is the same however the text was cut.
 */

export type Part =
  | { readonly type: 'reasoning'; readonly text: string }
  | { readonly type: 'content'; readonly text: string }
  /** A call begins; the arguments that follow are its own. */
  | { readonly type: 'call'; readonly name: string }
  /** The next piece of them, JSON. */
  | { readonly type: 'arguments'; readonly text: string }
  /** The call that began last is none: its arguments broke off or are no JSON. `text`: all of it as the model wrote it. */
  | { readonly type: 'broken'; readonly text: string };

export interface PartParser {
  push(text: string): Part[];
  /** The text is over. */
  flush(): Part[];
  /** It has read the one call that there may be, and reads nothing that follows. */
  readonly done: boolean;
}

/** Length of the longest end of `text` that is the beginning, and no more, of `marker`. */
function partialEnd(text: string, marker: string): number {
  let length = Math.min(marker.length - 1, text.length);
  while (length > 0 && !text.endsWith(marker.slice(0, length))) length--;
  return length;
}

/** Looks for one marker in text that comes in pieces. */
export class MarkerFinder {
  readonly marker: string;
  #held = '';

  constructor(marker: string) {
    this.marker = marker;
  }

  /** `before`: text that is certain to stand before the marker; `after`: what follows it, once it has been found. */
  push(text: string): { readonly before: string; readonly after?: string } {
    const all = this.#held + text;
    const at = all.indexOf(this.marker);
    if (at >= 0) {
      this.#held = '';
      return { before: all.slice(0, at), after: all.slice(at + this.marker.length) };
    }
    const keep = partialEnd(all, this.marker);
    this.#held = all.slice(all.length - keep);
    return { before: all.slice(0, all.length - keep) };
  }

  /** What was held back, which is not the marker. */
  flush(): string {
    const held = this.#held;
    this.#held = '';
    return held;
  }
}

/** Holds blanks back until something follows them. */
export class TrailingBlanks {
  #held = '';

  push(text: string): string {
    const kept = text.trimEnd();
    if (kept === '') {
      this.#held += text;
      return '';
    }
    const out = this.#held + kept;
    this.#held = text.slice(kept.length);
    return out;
  }

  /** The blanks themselves. */
  flush(): string {
    const held = this.#held;
    this.#held = '';
    return held;
  }
}
