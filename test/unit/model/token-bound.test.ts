import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { demoModelDir } from '../../../src/config/demo-model.ts';
import { charactersPerToken } from '../../../src/model/token-bound.ts';

const byteFallback = Array.from(
  { length: 256 },
  (_, byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`,
);

/** The make of Llama 2 and Mistral, with a few words. */
function sentencePiece(change: object = {}, model: object = {}) {
  const words = ['<unk>', ...byteFallback, '▁', 'a', 'b', 'é', '▁a', 'ab', '▁ab', 'aba', 'abab'];
  return {
    added_tokens: [{ id: 0, content: '<unk>', special: true, lstrip: false, rstrip: false }],
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'Prepend', prepend: '▁' },
        { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
      ],
    },
    pre_tokenizer: null,
    post_processor: null,
    decoder: null,
    model: {
      type: 'BPE',
      vocab: Object.fromEntries(words.map((word, id) => [word, id])),
      merges: [
        ['▁', 'a'],
        ['a', 'b'],
        ['▁a', 'b'],
        ['ab', 'a'],
        ['ab', 'ab'],
      ],
      unk_token: '<unk>',
      fuse_unk: true,
      byte_fallback: true,
      ...model,
    },
    ...change,
  };
}

const demo = JSON.parse(readFileSync(join(demoModelDir(), 'tokenizer.json'), 'utf8')) as {
  readonly model: { readonly vocab: Readonly<Record<string, number>> };
};
const withNfc = (json: object) => ({ ...json, normalizer: { type: 'NFC' } });

const texts = fc.oneof(
  fc.string({ unit: 'binary' }),
  // What composes best, and the tokens that are long.
  fc.string({
    unit: fc.constantFrom('\u03b1', '\u0313', '\u0300', '\u0345', '\u1112', '\u1161', '\u11ab', '𝅗𝅥'),
  }),
  fc
    .array(
      fc.constantFrom(
        'abab',
        ' ab',
        '<|assistant|>',
        ' Switzerland',
        ' temperature',
        'additionalProperties',
        'é',
        ' ',
      ),
    )
    .map((words) => words.join('')),
);

describe('the characters that a token can stand for', () => {
  it.each([
    ['byte-level', demo, 20],
    ['byte-level after NFC', withNfc(demo), 80],
    ['with byte fallback', sentencePiece(), 6],
  ])('bound the tokens of any text from below: %s', (_name, json, most) => {
    expect(charactersPerToken(json, {})).toBe(most);
    const tokenizer = new HuggingFaceTokenizer(json, {});
    fc.assert(
      fc.property(texts, (text) => {
        const { ids } = tokenizer.encode(text, { add_special_tokens: false });
        expect(ids.length).toBeGreaterThanOrEqual(Math.ceil(text.length / most));
      }),
    );
  });

  const { '<0x80>': _missing, ...holey } = sentencePiece().model.vocab;
  const { A: _letter, ...holeyDemo } = demo.model.vocab;
  it.each([
    ['another model', sentencePiece({}, { type: 'Unigram' }), {}],
    ['bytes without a token', sentencePiece({}, { vocab: holey }), {}],
    ['bytes without a token, byte-level', { ...demo, model: { ...demo.model, vocab: holeyDemo } }, {}],
    ['no way to write any text', sentencePiece({}, { byte_fallback: false }), {}],
    ['suffixes of words', sentencePiece({}, { end_of_word_suffix: '</w>' }), {}],
    ['a normalizer that cuts', sentencePiece({ normalizer: { type: 'Strip', strip_left: true } }), {}],
    [
      'a normalizer that replaces by less',
      sentencePiece({ normalizer: { type: 'Replace', pattern: { String: '  ' }, content: ' ' } }),
      {},
    ],
    ['blanks left out', sentencePiece({ pre_tokenizer: { type: 'WhitespaceSplit' } }), {}],
    [
      'matches left out',
      sentencePiece({ pre_tokenizer: { type: 'Split', pattern: { String: ' ' }, behavior: 'Removed' } }),
      {},
    ],
    [
      'tokens that swallow blanks',
      sentencePiece({
        added_tokens: [{ id: 0, content: '<unk>', special: true, lstrip: false, rstrip: true }],
      }),
      {},
    ],
    ['blanks joined', demo, { remove_space: true }],
    ['nothing that can be read', 'no tokenizer', {}],
  ])('are not told with %s', (_name, json, settings) => {
    expect(charactersPerToken(json, settings)).toBe(Number.POSITIVE_INFINITY);
  });
});
