/**
 * How much text one token can stand for, read from tokenizer.json: with it the length of a text alone says how many tokens it has at
 * least. Finite only if every step from text to tokens is known to lose nothing but what is counted here; a prompt that fits must
 * never look too long.
 */
import { z } from '../zod.ts';
import { byteLevelToken } from './byte-level.ts';
import { replaceSchema } from './token-pieces.ts';

const stepSchema = z.looseObject({ type: z.string() });
const normalizerListSchema = z.looseObject({ normalizers: z.array(stepSchema) });
const preTokenizerListSchema = z.looseObject({ pretokenizers: z.array(stepSchema) });
const splitSchema = z.looseObject({ behavior: z.string(), invert: z.boolean().default(false) });
const modelSchema = z.looseObject({
  type: z.literal('BPE'),
  byte_fallback: z.boolean().nullish(),
  continuing_subword_prefix: z.string().nullish(),
  continuing_subword_suffix: z.string().nullish(),
  end_of_word_suffix: z.string().nullish(),
  vocab: z.custom<Readonly<Record<string, number>>>((value) => typeof value === 'object' && value !== null),
});
const tokenizerSchema = z.looseObject({
  normalizer: stepSchema.nullish(),
  pre_tokenizer: stepSchema.nullish(),
  model: modelSchema,
  added_tokens: z
    .array(z.looseObject({ content: z.string(), lstrip: z.boolean(), rstrip: z.boolean() }))
    .default([]),
});
type Step = z.infer<typeof stepSchema>;

/** NFC makes one UTF-16 unit of four at most (U+1F82, ᾂ). */
const NFC_SHRINKS = 4;

/**
 * Most UTF-16 units of text that a single token stands for; Infinity if that is unknown. `json` is tokenizer.json, `settings`
 * tokenizer_config.json.
 */
export function charactersPerToken(json: unknown, settings: Readonly<Record<string, unknown>>): number {
  const parsed = tokenizerSchema.safeParse(json);
  if (!parsed.success) return Number.POSITIVE_INFINITY;
  const { normalizer, pre_tokenizer: preTokenizer, model, added_tokens: added } = parsed.data;
  const loses =
    settings['remove_space'] === true ||
    settings['do_lowercase_and_remove_accent'] === true ||
    // These absorb any number of adjacent blanks.
    added.some(({ lstrip, rstrip }) => lstrip || rstrip) ||
    !keepsText(preTokenizer) ||
    !hasTokenForAll(preTokenizer, model);
  if (loses) return Number.POSITIVE_INFINITY;
  // A byte-level token has one character a byte, and a text has no more units than bytes.
  let longest = 1;
  for (const token in model.vocab) longest = Math.max(longest, token.length);
  for (const { content } of added) longest = Math.max(longest, content.length);
  return longest * shrinkingBy(normalizer);
}

/** How many times shorter a normalizer can make a text. */
function shrinkingBy(normalizer: Step | null | undefined): number {
  if (!normalizer) return 1;
  switch (normalizer.type) {
    case 'Prepend':
      return 1;
    case 'NFC':
      return NFC_SHRINKS;
    case 'Replace': {
      const parsed = replaceSchema.safeParse(normalizer);
      if (!parsed.success) return Number.POSITIVE_INFINITY;
      const { pattern, content } = parsed.data;
      return content.length >= pattern.String.length ? 1 : Number.POSITIVE_INFINITY;
    }
    case 'Sequence': {
      const list = normalizerListSchema.safeParse(normalizer);
      if (!list.success) return Number.POSITIVE_INFINITY;
      return list.data.normalizers.reduce((product, one) => product * shrinkingBy(one), 1);
    }
    default:
      return Number.POSITIVE_INFINITY;
  }
}

function keepsText(preTokenizer: Step | null | undefined): boolean {
  if (!preTokenizer) return true;
  switch (preTokenizer.type) {
    case 'ByteLevel':
    case 'Metaspace':
    case 'Digits':
    case 'Punctuation':
      return true;
    case 'Split': {
      const parsed = splitSchema.safeParse(preTokenizer);
      return parsed.success && !parsed.data.invert && parsed.data.behavior.toLowerCase() !== 'removed';
    }
    case 'Sequence': {
      const list = preTokenizerListSchema.safeParse(preTokenizer);
      return list.success && list.data.pretokenizers.every(keepsText);
    }
    default:
      return false;
  }
}

/** Every text has tokens, none of them the unknown token, which could stand for any amount. */
function hasTokenForAll(preTokenizer: Step | null | undefined, model: z.infer<typeof modelSchema>): boolean {
  const {
    continuing_subword_prefix: prefix,
    continuing_subword_suffix: suffix,
    end_of_word_suffix: end,
  } = model;
  if (prefix || suffix || end) return false;
  const has = (token: string) => Object.hasOwn(model.vocab, token);
  if (model.byte_fallback) return BYTES.every((byte) => has(byteFallbackToken(byte)));
  return isByteLevel(preTokenizer) && BYTES.every((byte) => has(byteLevelToken(byte)));
}

const BYTES: readonly number[] = Array.from({ length: 256 }, (_, byte) => byte);

function byteFallbackToken(byte: number): string {
  return `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`;
}

function isByteLevel(preTokenizer: Step | null | undefined): boolean {
  if (preTokenizer?.type === 'ByteLevel') return true;
  const list = preTokenizerListSchema.safeParse(preTokenizer);
  return list.success && list.data.pretokenizers.some(isByteLevel);
}
