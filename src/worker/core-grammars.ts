/** The grammars of the requests on the core thread: what each sequence may draw next, and whether anything may. */
import { PdError } from '../errors.ts';
import { type GrammarPlace, TokenGrammar } from '../grammar/masks.ts';
import { Vocabulary } from '../grammar/vocabulary.ts';
import { remember } from '../memories.ts';
import type { GrammarUse, ScheduledSequence, TokenHistory } from '../scheduler/types.ts';

/** What they have found of their masks so far is worth keeping: the same schema comes again. */
const MOST_GRAMMARS = 32;

/** How far a sequence has been read. */
interface Progress {
  readonly grammar: TokenGrammar;
  place: GrammarPlace;
  /** Tokens, the prompt's included. */
  length: number;
}

export class CoreGrammars {
  readonly #vocabSize: number;
  readonly #grammars = new Map<string, TokenGrammar>();
  readonly #progress = new WeakMap<TokenHistory, Progress>();
  #vocabulary: Vocabulary | undefined;

  /** `vocabSize`: of the model, as masks have it. */
  constructor(vocabSize: number) {
    this.#vocabSize = vocabSize;
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
    const known = this.#grammars.get(key);
    this.#vocabulary ??= new Vocabulary(vocabulary);
    const grammar = known ?? new TokenGrammar(tables, this.#vocabulary, ahead);
    remember(this.#grammars, key, grammar, MOST_GRAMMARS);
    return grammar;
  }
}
