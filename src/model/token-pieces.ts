/**
 * What each token contributes to the text, read from tokenizer.json's decoder. Two families cover the models we serve:
 * byte-level BPE (Llama 3, Qwen, the demo model) and SentencePiece-like BPE with byte fallback (Llama 2, Mistral).
 */

import { PdError } from '../errors.ts';
import { z } from '../zod.ts';
import { byteLevelBytes } from './byte-level.ts';
import { checked, invalid } from './checked.ts';

/**
 * `bytes` join with their neighbours' before they are read as UTF-8, so that a character may be split over tokens. `text` stands alone:
 * bytes on either side of it never join across it.
 */
export type TokenPiece =
  | { readonly kind: 'bytes'; readonly bytes: Uint8Array }
  | { readonly kind: 'text'; readonly text: string };

export interface PieceReader {
  /** Of a token that is part of the model's vocabulary, not an added one. */
  readonly piece: (token: string) => TokenPiece;
  /** Spaces cut from the front of the whole text. */
  readonly leadingSpaces: number;
}

const decoderSchema = z.looseObject({ type: z.string() });
type DecoderJson = z.infer<typeof decoderSchema>;
const decoderListSchema = z.looseObject({ decoders: z.array(decoderSchema) });

export const replaceSchema = z.looseObject({
  pattern: z.looseObject({ String: z.string() }),
  content: z.string(),
});
const stripSchema = z.looseObject({ content: z.literal(' '), start: z.number().int(), stop: z.literal(0) });
const metaspaceSchema = z.looseObject({
  replacement: z.string().default('▁'),
  prepend_scheme: z.string().default('always'),
});

/** Throws MODEL_UNSUPPORTED where the decoder is of another family: text would come out wrong. */
export function readPieces(decoder: unknown, where: string): PieceReader {
  const parsed = decoderSchema.safeParse(decoder);
  if (!parsed.success) throw invalid(`${where} has no decoder with a type`);
  switch (parsed.data.type) {
    case 'ByteLevel':
      return { piece: byteLevelPiece, leadingSpaces: 0 };
    case 'Metaspace':
      return readSequence([parsed.data], where);
    case 'Sequence': {
      const { decoders } = checked(decoderListSchema, decoder, where);
      const [only, second] = decoders;
      if (only?.type === 'ByteLevel' && second === undefined) return readPieces(only, where);
      return readSequence(decoders, where);
    }
    default:
      throw unsupported(parsed.data.type, where);
  }
}

function byteLevelPiece(token: string): TokenPiece {
  const bytes = byteLevelBytes(token);
  return bytes ? { kind: 'bytes', bytes } : { kind: 'text', text: token };
}

function readSequence(decoders: readonly DecoderJson[], where: string): PieceReader {
  const replacements: { readonly from: string; readonly to: string }[] = [];
  let byteFallback = false;
  let leadingSpaces = 0;
  for (const decoder of decoders) {
    switch (decoder.type) {
      case 'Replace': {
        const { pattern, content } = parse(replaceSchema, decoder, where);
        replacements.push({ from: pattern.String, to: content });
        break;
      }
      case 'Metaspace': {
        const { replacement, prepend_scheme } = parse(metaspaceSchema, decoder, where);
        replacements.push({ from: replacement, to: ' ' });
        if (prepend_scheme !== 'never') leadingSpaces = 1;
        break;
      }
      case 'ByteFallback':
        byteFallback = true;
        break;
      case 'Fuse':
        break;
      case 'Strip':
        leadingSpaces = parse(stripSchema, decoder, where).start;
        break;
      default:
        throw unsupported(decoder.type, where);
    }
  }
  return {
    leadingSpaces,
    piece: (token) => {
      const byte = byteFallback ? /^<0x([0-9A-Fa-f]{2})>$/.exec(token)?.[1] : undefined;
      if (byte !== undefined) return { kind: 'bytes', bytes: Uint8Array.of(Number.parseInt(byte, 16)) };
      return {
        kind: 'text',
        text: replacements.reduce((text, { from, to }) => text.replaceAll(from, to), token),
      };
    },
  };
}

function parse<T>(schema: z.ZodType<T>, decoder: DecoderJson, where: string): T {
  return checked(schema, decoder, `${where}: decoder ${decoder.type}`, 'MODEL_UNSUPPORTED');
}

function unsupported(type: string, where: string): PdError {
  return new PdError(
    'MODEL_UNSUPPORTED',
    `${where}: decoder ${type} is not supported (only ByteLevel, Metaspace, and sequences of Replace, Metaspace, ByteFallback, Fuse, Strip)`,
  );
}
