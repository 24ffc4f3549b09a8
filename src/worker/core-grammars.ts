/** The grammars of the requests on the core thread: what each sequence may draw next, and whether anything may. */
import { PdError } from '../errors.ts';
import { TokenGrammar, Vocabulary } from '../grammar/masks.ts';
import type { GrammarState } from '../grammar/states.ts';
import type {
  ForwardBatch,
  ForwardResult,
  GrammarUse,
  SampledToken,
  ScheduledSequence,
  TokenHistory,
} from '../scheduler/types.ts';

/** What they have found of their masks so far is worth keeping: the same schema comes again. */
const MOST_GRAMMARS = 32;

/** How far a sequence has been read. */
interface Progress {
  readonly grammar: TokenGrammar;
  state: GrammarState;
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
    if (!sequence.sample?.params.grammar) return undefined;
    return Promise.resolve(sequence).then((one) => this.#maskOf(one));
  }

  /** The same, with those tokens marked that end their grammar. */
  marked(batch: ForwardBatch, result: ForwardResult): ForwardResult {
    if (!batch.sequences.some(({ sample }) => sample?.params.grammar)) return result;
    const sequences = new Map(batch.sequences.map((sequence) => [sequence.sequenceId, sequence]));
    const sampled = result.sampled.map((one): SampledToken => {
      const sequence = sequences.get(one.sequenceId);
      return sequence && this.#ends(sequence, one.token) ? { ...one, ends: true } : one;
    });
    return { ...result, sampled };
  }

  /** Whether a token that was drawn elsewhere may come first, and something may follow it. */
  goesOn(use: GrammarUse, token: number): boolean {
    const grammar = this.#grammarOf(use);
    const state = grammar.accept(grammar.start, token);
    return state !== undefined && !state.isOver;
  }

  #maskOf(sequence: ScheduledSequence): Uint32Array {
    const { grammar, state } = this.#read(sequence);
    const mask = new Uint32Array(Math.ceil(this.#vocabSize / 32));
    grammar.fillMask(state, mask);
    if (!state.mayEnd) return mask;
    for (const token of sequence.sample!.params.stopTokenIds) {
      if (token < this.#vocabSize) mask[token >>> 5]! |= 1 << (token & 31);
    }
    return mask;
  }

  #ends(sequence: ScheduledSequence, token: number): boolean {
    if (!sequence.sample?.params.grammar) return false;
    const { grammar, state } = this.#read(sequence);
    return grammar.accept(state, token)?.isOver ?? false;
  }

  /** Also after tokens that were not drawn here, and at the start of a sequence that computes its prompt anew. */
  #read({ sequenceId, sample }: ScheduledSequence): Progress {
    const { params, history } = sample!;
    const use = params.grammar!;
    if (!history) throw new PdError('INTERNAL', `sequence ${sequenceId} has a grammar and no history`);
    let progress = this.#progress.get(history);
    if (!progress) {
      const grammar = this.#grammarOf(use);
      progress = { grammar, state: grammar.start, length: history.promptLength };
      this.#progress.set(history, progress);
    }
    for (const token of history.tokens(progress.length, history.length)) {
      const state = progress.grammar.accept(progress.state, token);
      if (!state) {
        throw new PdError('INTERNAL', `sequence ${sequenceId} has token ${token}, which its grammar forbids`);
      }
      progress.state = state;
      progress.length++;
    }
    return progress;
  }

  #grammarOf({ key, tables, vocabulary }: GrammarUse): TokenGrammar {
    const known = this.#grammars.get(key);
    this.#vocabulary ??= new Vocabulary(vocabulary);
    const grammar = known ?? new TokenGrammar(tables, this.#vocabulary);
    // The latest last.
    this.#grammars.delete(key);
    this.#grammars.set(key, grammar);
    const [oldest] = this.#grammars.keys();
    if (this.#grammars.size > MOST_GRAMMARS && oldest !== undefined) this.#grammars.delete(oldest);
    return grammar;
  }
}
