/** Of what tokenizers encode only a part is given, and that is the same. */
import { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { BoundedEncoding } from '../../../src/model/bounded-encoding.ts';
import { TextTooLong, Tokenizer } from '../../../src/model/tokenizer.ts';

let demo: Tokenizer;
beforeAll(async () => {
  demo = await Tokenizer.load(demoModelDir());
});

/** Without a pre-tokenizer the whole text is one word, and each byte that has no token is one. */
const ONE_WORD = {
  added_tokens: [{ id: 3, content: '<s>', special: true, lstrip: false, rstrip: false, normalized: false }],
  normalizer: {
    type: 'Sequence',
    normalizers: [
      { type: 'Prepend', prepend: '_' },
      { type: 'Replace', pattern: { String: ' ' }, content: '_' },
    ],
  },
  pre_tokenizer: null,
  post_processor: {
    type: 'TemplateProcessing',
    single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
    pair: [],
    special_tokens: { '<s>': { id: '<s>', ids: [3], tokens: ['<s>'] } },
  },
  decoder: null,
  model: {
    type: 'BPE',
    unk_token: '<unk>',
    vocab: { '<unk>': 0, a: 1, _: 2, '<s>': 3, b: 4, ab: 5, _ab: 6, abab: 7 },
    merges: ['a b', '_ ab', 'ab ab'],
    fuse_unk: false,
    byte_fallback: false,
  },
};

/** Longer than what is encoded whole, and with everything that texts are cut at. */
const texts = fc
  .array(
    fc.oneof(
      fc.constantFrom(
        'ab',
        ' ab',
        '<s>',
        '<|eot|>',
        '<|user|>',
        '\n\n  ',
        'the quick brown fox ',
        '7'.repeat(40),
      ),
      fc.string({ unit: 'binary', maxLength: 12 }),
    ),
    { minLength: 1, maxLength: 30 },
  )
  .map((parts) => {
    const text = parts.join('');
    return text.repeat(Math.ceil(9_000 / Math.max(1, text.length)));
  });
const counts = fc.oneof(fc.integer({ min: 1, max: 40 }), fc.integer({ min: 1, max: 20_000 }));

describe.each([
  ['the demo model', () => demo],
  [
    'one whose words are whole texts',
    () => {
      const library = new HuggingFaceTokenizer(ONE_WORD, {});
      const bounded = new BoundedEncoding(library);
      return {
        encode: (
          text: string,
          { addSpecialTokens = true, bounds }: NonNullable<Parameters<Tokenizer['encode']>[1]>,
        ) =>
          bounds
            ? bounded.encode(text, addSpecialTokens, bounds)
            : library.encode(text, { add_special_tokens: addSpecialTokens }).ids,
      };
    },
  ],
] as const)('of %s', (_, load) => {
  it('the end is what encoding all of the text ends with', () => {
    const tokenizer = load();
    fc.assert(
      fc.property(texts, counts, fc.boolean(), (text, last, addSpecialTokens) => {
        const all = tokenizer.encode(text, { addSpecialTokens });
        const bounds = { most: 100_000, last };
        expect(tokenizer.encode(text, { addSpecialTokens, bounds })).toEqual(all.slice(-last));
      }),
      { numRuns: 30 },
    );
  });

  it('a text that is short enough is whole, and one that is too long says so', () => {
    const tokenizer = load();
    fc.assert(
      fc.property(texts, counts, (text, most) => {
        const all = tokenizer.encode(text, {});
        try {
          expect(tokenizer.encode(text, { bounds: { most } })).toEqual(all);
        } catch (error) {
          if (!(error instanceof TextTooLong)) throw error;
          expect(error.tokens).toBeGreaterThanOrEqual(most);
          expect(all.length).toBeGreaterThan(error.tokens);
        }
        // And nothing is left of it for the next.
        expect(tokenizer.encode(text, {})).toEqual(all);
      }),
      { numRuns: 30 },
    );
  });
});

it('a text that is much too long is not merged to its end, nor is one of which the end is wanted', () => {
  const library = new HuggingFaceTokenizer({ ...ONE_WORD, pre_tokenizer: { type: 'Whitespace' } }, {});
  let merged = 0;
  const merge = library.model!.encode.bind(library.model);
  library.model!.encode = (words: string[]) => {
    merged += words.length;
    return merge(words);
  };
  const bounded = new BoundedEncoding(library);
  const text = 'abab ab '.repeat(5_000);
  expect(() => bounded.encode(text, true, { most: 1_000 })).toThrow(TextTooLong);
  expect(merged).toBeLessThan(2_000);
  merged = 0;
  expect(bounded.encode(text, true, { most: 1_000, last: 10 })).toHaveLength(10);
  expect(merged).toBeLessThan(20);
});

it('a word that would take too long is refused, unless it is not looked at', () => {
  const bounds = { most: 1_000, last: 8 };
  const word = 'a'.repeat(1_200_000);
  for (const text of [word, word + word]) {
    expect(() => demo.encode(text, { bounds })).toThrow(
      expect.objectContaining({
        code: 'BODY_TOO_COSTLY',
        message: expect.stringMatching(/^a word of more than 1048576/),
      }),
    );
  }
  const long = 'a '.repeat(2 ** 22 + 1);
  expect(() => demo.encode(long, { bounds })).toThrow(expect.objectContaining({ code: 'BODY_TOO_COSTLY' }));
  expect(demo.encode(`${word} and so on, as long as it is of 8 tokens`, { bounds })).toHaveLength(8);
  expect(demo.encode(word.slice(0, 20_000), { bounds })).toHaveLength(8);
});
