/** The grammars of the requests on the core thread: what each sequence may draw next, and whether anything may. */
import { PdError } from '../errors.ts';
import { type GrammarPlace, TokenGrammar } from '../grammar/masks.ts';
import { Vocabulary } from '../grammar/vocabulary.ts';
import type { GrammarUse, ScheduledSequence, TokenHistory } from '../scheduler/types.ts';

/**
 * What they have found of their masks so far is worth keeping: the same schema comes again. In bytes of all that are kept, about; those of
 * requests under way are held by them.
 */
const MOST_BYTES = 256 * 2 ** 20;

interface Kept {
  readonly grammar: TokenGrammar;
  /** When it was looked at last. */
  bytes: number;
}

/** How far a sequence has been read. */
interface Progress {
  readonly grammar: TokenGrammar;
  place: GrammarPlace;
  /** Tokens, the prompt's included. */
  length: number;
}

export class CoreGrammars {
  readonly #vocabSize: number;
  readonly #mostBytes: number;
  /** Those that have been used longest ago first. */
  readonly #grammars = new Map<string, Kept>();
  #bytes = 0;
  readonly #progress = new WeakMap<TokenHistory, Progress>();
  #vocabulary: Vocabulary | undefined;

  /** `vocabSize`: of the model, as masks have it. `mostBytes`: of grammars kept. */
  constructor(vocabSize: number, mostBytes = MOST_BYTES) {
    this.#vocabSize = vocabSize;
    this.#mostBytes = mostBytes;
  }

  /** Its bits, found once the caller has let go of the thread; undefined where the sequence is under no grammar. Rejects where it fails alone. */
  mask(sequence: ScheduledSequence): Promise<Uint32Array> | undefined {
    const { params, history } = sequence.sample ?? {};
    if (!params?.grammar || !history) return undefined;
    const { grammar, stopTokenIds } = params;
    return Promise.resolve().then(() => this.#maskOf(grammar, history, stopTokenIds));
  }

  /** Whether nothing can follow `token` behind the text that `history` is. What fails here does so again for its mask, and ends one sequence then. */
  isLastToken(use: GrammarUse, history: TokenHistory, token: number): boolean {
    try {
      const { grammar, place } = this.#read(use, history);
      return grammar.accept(place, token)?.isOver ?? false;
    } catch {
      return false;
    }
  }

  /** Whether a token that was drawn elsewhere may come first. */
  mayBegin(use: GrammarUse, token: number): boolean {
    try {
      const grammar = this.#grammarOf(use);
      return grammar.accept(grammar.start, token) !== undefined;
    } catch {
      return false;
    }
  }

  #maskOf(use: GrammarUse, history: TokenHistory, stopTokenIds: readonly number[]): Uint32Array {
    const { grammar, place } = this.#read(use, history);
    const mask = new Uint32Array(Math.ceil(this.#vocabSize / 32));
    grammar.fillMask(place, mask);
    this.#count(use.key);
    if (!place.mayEnd) return mask;
    for (const token of stopTokenIds) {
      if (token < this.#vocabSize) mask[token >>> 5]! |= 1 << (token & 31);
    }
    return mask;
  }

  /** Also after tokens that were not drawn here, and when a prompt is recomputed. */
  #read(use: GrammarUse, history: TokenHistory): Progress {
    let progress = this.#progress.get(history);
    if (!progress) {
      const grammar = this.#grammarOf(use);
      progress = { grammar, place: grammar.start, length: history.promptLength };
      this.#progress.set(history, progress);
    }
    for (const token of history.tokens(progress.length, history.length)) {
      const place = progress.grammar.accept(progress.place, token);
      if (!place) throw new PdError('INTERNAL', `token ${token} was drawn, which the grammar forbids`);
      progress.place = place;
      progress.length++;
    }
    return progress;
  }

  #grammarOf({ key, tables, ahead, vocabulary }: GrammarUse): TokenGrammar {
    this.#vocabulary ??= new Vocabulary(vocabulary);
    const known = this.#grammars.get(key);
    const kept = known ?? { grammar: new TokenGrammar(tables, this.#vocabulary, ahead), bytes: 0 };
    this.#grammars.delete(key);
    this.#grammars.set(key, kept);
    this.#count(key);
    return kept.grammar;
  }

  /** Lets go of the oldest where what they have found since takes too much. */
  #count(key: string): void {
    const kept = this.#grammars.get(key);
    if (!kept) return;
    const { bytes } = kept.grammar;
    this.#bytes += bytes - kept.bytes;
    kept.bytes = bytes;
    for (const [oldest, { bytes }] of this.#grammars) {
      if (this.#bytes <= this.#mostBytes || oldest === key) return;
      this.#grammars.delete(oldest);
      this.#bytes -= bytes;
    }
  }
}
