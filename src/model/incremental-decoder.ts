/** Text of a growing token sequence, as it becomes certain. */
import type { TokenPiece } from './token-pieces.ts';

/** What the decoder needs of a tokenizer. */
export interface PieceSource {
  /** Undefined for a token without text: unknown, or special and skipped. */
  piece(id: number, skipSpecialTokens: boolean): TokenPiece | undefined;
  /** Spaces cut from the front of the whole text. */
  readonly leadingSpaces: number;
}

/**
 * All deltas and the flush joined equal the decoding of the whole sequence. A character that is split over tokens comes out with its last
 * token, never broken; bytes that are no UTF-8 become U+FFFD once that is certain. Each push costs what its token is long.
 */
export class IncrementalDecoder {
  readonly #source: PieceSource;
  readonly #skipSpecialTokens: boolean;
  // U+FEFF at the front is part of the text.
  readonly #utf8 = new TextDecoder('utf-8', { ignoreBOM: true });
  #spacesToCut: number;

  constructor(
    source: PieceSource,
    { skipSpecialTokens = true }: { readonly skipSpecialTokens?: boolean } = {},
  ) {
    this.#source = source;
    this.#skipSpecialTokens = skipSpecialTokens;
    this.#spacesToCut = source.leadingSpaces;
  }

  /** The text that this token makes certain; often empty inside of a character. */
  push(id: number): string {
    const piece = this.#source.piece(id, this.#skipSpecialTokens);
    if (piece === undefined) return '';
    return this.#cut(
      piece.kind === 'bytes'
        ? this.#utf8.decode(piece.bytes, { stream: true })
        : this.#utf8.decode() + piece.text,
    );
  }

  /** The rest, when no token follows: a broken character becomes U+FFFD. The decoder can be reused afterwards. */
  flush(): string {
    const rest = this.#cut(this.#utf8.decode());
    this.#spacesToCut = this.#source.leadingSpaces;
    return rest;
  }

  #cut(text: string): string {
    if (this.#spacesToCut === 0 || text === '') return text;
    let spaces = 0;
    while (spaces < this.#spacesToCut && text[spaces] === ' ') spaces++;
    this.#spacesToCut = spaces === text.length ? this.#spacesToCut - spaces : 0;
    return text.slice(spaces);
  }
}
