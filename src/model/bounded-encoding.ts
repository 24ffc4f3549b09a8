/**
 * Text to token ids where not all of them are wanted: of a text that is too long nobody needs to know by how much, of one that is cut off only
 * its end. What costs time is merging the letters of a word, each of which is merged alone: so this looks at the words that the library has
 * cut the text into before they are merged, and merges no more of them than it must. What it gives is what the library would.
 */
import type { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import { PdError } from '../errors.ts';

export interface EncodingBounds {
  /** A text of more tokens is too long. Of what is cut off: the tokens that may be left. */
  readonly most: number;
  /** Only so many ids of its end are wanted, and any number may stand before them. */
  readonly last?: number;
}

/** A text has more tokens than it may have. */
export class TextTooLong extends Error {
  /** So many at least. */
  readonly tokens: number;

  constructor(tokens: number) {
    super(`the text has more than ${tokens} tokens`);
    this.tokens = tokens;
  }
}

/** Texts of so many UTF-16 units are encoded whole: it takes some milliseconds. */
const SHORT = 8_192;
/** Of one word: as many units are merged in some seconds. */
const LONGEST_WORD = 2 ** 20;
/** Of a text whose end is wanted: cutting it into words takes a second for each million. */
const LONGEST_CUT_OFF = 2 ** 23;
/** No text of several thousand tokens has so many units a token. */
const UNITS_PER_TOKEN = 8;
/** How much too long a text may be for its tokens to be counted to the end, so that it is known how much must go. */
const COUNTED_BEYOND = 0.25;

type Merge = (words: string[]) => string[];

export class BoundedEncoding {
  readonly #library: HuggingFaceTokenizer;
  readonly #merge: Merge | undefined;
  /** What is done with words now; undefined: they are merged. */
  #take: Merge | undefined;

  /** The library's model takes its words from here from now on. */
  constructor(library: HuggingFaceTokenizer) {
    this.#library = library;
    const { model } = library;
    // Of other models, and where unknown tokens are put together, a word's tokens hang on its neighbours or on more than its letters.
    if (model?.config.type !== 'BPE' || model.fuse_unk) return;
    const merge = model.encode.bind(model);
    this.#merge = merge;
    model.encode = (words: string[]) => (this.#take ?? merge)(words);
  }

  /** Throws TextTooLong; BODY_TOO_COSTLY for what would take many seconds. */
  encode(text: string, addSpecialTokens: boolean, { most, last }: EncodingBounds): number[] {
    const merge = this.#merge;
    if (!merge || text.length <= SHORT) return this.#whole(text, addSpecialTokens).ids;
    const longest = Math.max(LONGEST_WORD, UNITS_PER_TOKEN * most);
    const merged = (word: string): string[] => {
      if (word.length <= longest) return merge([word]);
      throw new PdError(
        'BODY_TOO_COSTLY',
        `a word of more than ${longest} characters would take too long to tokenize`,
      );
    };
    try {
      // Where its end alone is too long a word, the rest need not be cut into words first.
      if (text.length > 2 * longest) {
        const { words, rest } = this.#wordsIn(text.slice(-longest - 1));
        if (words.length === 1 && rest === 0) merged(words[0]!);
      }
      return last === undefined
        ? this.#counted(text, addSpecialTokens, merged, most)
        : this.#end(text, addSpecialTokens, merged, last);
    } finally {
      this.#take = undefined;
    }
  }

  #whole(text: string, addSpecialTokens: boolean) {
    return this.#library.encode(text, { add_special_tokens: addSpecialTokens });
  }

  /** `rest`: tokens that are none of words. */
  #wordsIn(text: string): { readonly words: readonly string[]; readonly rest: number } {
    const words: string[] = [];
    this.#take = (more) => {
      for (const word of more) words.push(word);
      return [];
    };
    return { words, rest: this.#whole(text, false).ids.length };
  }

  #counted(text: string, addSpecialTokens: boolean, merged: (word: string) => string[], most: number) {
    const enough = Math.max(0, Math.floor(most * (1 + COUNTED_BEYOND)));
    let count = 0;
    this.#take = (words) => {
      const tokens: string[] = [];
      for (const word of words) {
        for (const token of merged(word)) tokens.push(token);
        if (count + tokens.length > enough) throw new TextTooLong(enough);
      }
      count += tokens.length;
      return tokens;
    };
    return this.#whole(text, addSpecialTokens).ids;
  }

  /** All are cut into words first, with a mark in the place of their tokens; then they are merged from the end. */
  #end(text: string, addSpecialTokens: boolean, merged: (word: string) => string[], last: number) {
    if (text.length > LONGEST_CUT_OFF) {
      throw new PdError(
        'BODY_TOO_COSTLY',
        `a text of ${text.length} characters would take too long to cut off at its front; at most ${LONGEST_CUT_OFF} are supported`,
      );
    }
    const sections: (readonly string[])[] = [];
    this.#take = (words) => {
      sections.push(words);
      return [MARK];
    };
    const { ids, tokens } = this.#whole(text, addSpecialTokens);
    const { tokens_to_ids: known, unk_token_id: unknown } = this.#library.model!;
    const backwards: number[] = [];
    for (let i = tokens.length - 1; i >= 0 && backwards.length < last; i--) {
      if (tokens[i] !== MARK) {
        backwards.push(ids[i]!);
        continue;
      }
      const words = sections.pop()!;
      for (let at = words.length - 1; at >= 0 && backwards.length < last; at--) {
        const said = merged(words[at]!);
        for (let k = said.length - 1; k >= 0; k--) backwards.push((known.get(said[k]!) ?? unknown)!);
      }
    }
    return backwards.reverse().slice(-last);
  }
}

/** No text is cut into it: a lone surrogate. */
const MARK = '\ud800';
