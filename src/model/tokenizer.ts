/** A checkpoint's tokenizer: text to token ids and back, and chat messages to text. */
import { hash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import { PdError } from '../errors.ts';
import { z } from '../zod.ts';
import { BoundedEncoding, type EncodingBounds } from './bounded-encoding.ts';
import { type ChatMessage, ChatTemplate, type RenderOptions, readChatTemplate } from './chat-template.ts';
import { checked, invalid, readJson } from './checked.ts';
import { type ModelConfig, readModelConfig } from './config.ts';
import { IncrementalDecoder, type PieceSource } from './incremental-decoder.ts';
import { charactersPerToken } from './token-bound.ts';
import { type PieceReader, readPieces, type TokenPiece } from './token-pieces.ts';

export { TextTooLong } from './bounded-encoding.ts';
export type { ChatMessage, RenderOptions } from './chat-template.ts';
export { IncrementalDecoder } from './incremental-decoder.ts';

const addedTokenSchema = z.looseObject({
  id: z.number().int().nonnegative(),
  content: z.string(),
  special: z.boolean().default(false),
});
const tokenizerSchema = z.looseObject({
  added_tokens: z.array(addedTokenSchema).default([]),
  decoder: z.unknown(),
  model: z.looseObject({ type: z.string().nullish() }),
});
type AddedToken = z.infer<typeof addedTokenSchema>;

/** A special token in tokenizer_config.json: its text, or an object that holds it. */
const namedTokenSchema = z.union([
  z.string(),
  z.looseObject({ content: z.string() }).transform(({ content }) => content),
]);

/** Which tokens have text. */
export interface Decoding {
  /** Special ones have none; the default. */
  readonly skipSpecialTokens?: boolean;
  /** Special tokens, by their text, that keep it nevertheless. */
  readonly keep?: readonly string[];
}

interface EncodeOptions {
  readonly addSpecialTokens?: boolean;
  readonly bounds?: EncodingBounds | undefined;
}

export class Tokenizer implements PieceSource {
  /** Two of the same make the same ids of the same request: hex, over tokenizer, its settings, chat template and ends of text. */
  readonly digest: string;
  readonly leadingSpaces: number;
  /** Tokens that end a text, from config.json and generation_config.json. */
  readonly eosTokenIds: readonly number[];
  /** The one of the tokenizer's own settings, or the first of the model's. */
  readonly eosTokenId: number | undefined;
  /** Most UTF-16 units of text that one token stands for; Infinity where that cannot be told. */
  readonly charactersPerToken: number;
  readonly #library: HuggingFaceTokenizer;
  readonly #bounded: BoundedEncoding;
  readonly #pieces: readonly (TokenPiece | undefined)[];
  /** Results of `tokenString`: with twenty alternatives a token it is called very often. */
  readonly #strings: string[] = [];
  readonly #special: ReadonlySet<number>;
  readonly #specialIds: ReadonlyMap<string, number>;
  readonly #chat: ChatTemplate | undefined;

  private constructor(
    library: HuggingFaceTokenizer,
    { piece, leadingSpaces }: PieceReader,
    added: readonly AddedToken[],
    model: ModelConfig,
    chat: ChatTemplate | undefined,
    eosToken: string | undefined,
    mostCharacters: number,
    digest: string,
  ) {
    this.digest = digest;
    this.#library = library;
    this.#bounded = new BoundedEncoding(library);
    this.#pieces = piecesOf(library, added, piece);
    const special = added.filter((token) => token.special);
    this.#special = new Set(special.map(({ id }) => id));
    this.#specialIds = new Map(special.map(({ id, content }) => [content, id]));
    this.#chat = chat;
    this.leadingSpaces = leadingSpaces;
    this.eosTokenIds = model.eosTokenIds;
    this.eosTokenId = this.#specialIds.get(eosToken ?? '') ?? model.eosTokenIds[0];
    this.charactersPerToken = mostCharacters;
  }

  /** Reads tokenizer.json and the files beside it. Throws CHECKPOINT_INVALID or MODEL_UNSUPPORTED. */
  static async load(dir: string): Promise<Tokenizer> {
    const path = join(dir, 'tokenizer.json');
    const json = await readJson(path);
    if (json === undefined) throw noTokenizer(dir);
    const { added_tokens: added, decoder } = checked(tokenizerSchema, json, path);
    const { settings, template, model } = await readSettings(dir);
    const library = openLibrary(json, settings, path);
    const reader = readPieces(decoder, path);
    const named = namedTokens(settings);
    const chat = template === undefined ? undefined : new ChatTemplate(template, named, dir);
    const most = charactersPerToken(json, settings);
    const digest = await Tokenizer.digestOf(dir);
    return new Tokenizer(library, reader, added, model, chat, named['eos_token'], most, digest);
  }

  /** What `digest` will be, without building the tokenizer. Throws as `load` does where a file is missing or broken. */
  static async digestOf(dir: string): Promise<string> {
    const { settings, template, model } = await readSettings(dir);
    const { eosTokenIds, bosTokenId } = model;
    const bytes = await readFile(join(dir, 'tokenizer.json')).catch(() => {
      throw noTokenizer(dir);
    });
    const rest = JSON.stringify([settings, template, eosTokenIds, bosTokenId]);
    return hash('sha256', `${hash('sha256', bytes, 'hex')}${rest}`, 'hex').slice(0, 32);
  }

  /**
   * Token ids of `text`. Special tokens (a beginning-of-text) are added unless told otherwise, as for a prompt of a completion. Within `bounds`
   * it throws as BoundedEncoding does.
   */
  encode(text: string, { addSpecialTokens = true, bounds }: EncodeOptions = {}): number[] {
    if (bounds) return this.#bounded.encode(text, addSpecialTokens, bounds);
    return this.#library.encode(text, { add_special_tokens: addSpecialTokens }).ids;
  }

  /** Text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids outside of the vocabulary have no text. */
  decode(ids: Iterable<number>, options: { readonly skipSpecialTokens?: boolean } = {}): string {
    const decoder = new IncrementalDecoder(this, options);
    let text = '';
    for (const id of ids) text += decoder.push(id);
    return text + decoder.flush();
  }

  /** A new incremental decoder. */
  decoder({
    skipSpecialTokens = true,
    keep = [],
  }: Decoding = {}): Pick<IncrementalDecoder, 'push' | 'flush'> {
    if (!skipSpecialTokens || keep.length === 0) return new IncrementalDecoder(this, { skipSpecialTokens });
    const kept = new Set(keep.flatMap((text) => this.#specialIds.get(text) ?? []));
    const piece = (id: number, skip: boolean) => this.piece(id, skip && !kept.has(id));
    return new IncrementalDecoder({ piece, leadingSpaces: this.leadingSpaces });
  }

  /** The template's source. */
  get chatTemplate(): string | undefined {
    return this.#chat?.source;
  }

  /** The prompt of a chat; encode it without special tokens, the template writes them. Throws REQUEST_INVALID. */
  applyChatTemplate(messages: readonly ChatMessage[], options: RenderOptions = {}): string {
    if (!this.#chat) {
      throw new PdError('REQUEST_INVALID', 'the served model has no chat template; use /v1/completions');
    }
    return this.#chat.render(messages, options);
  }

  /** Text of one token by itself, special ones too: what log-probabilities show. */
  tokenString(id: number): string {
    this.#strings[id] ??= this.decode([id], { skipSpecialTokens: false });
    return this.#strings[id];
  }

  /** Bytes of one token; undefined for an id outside of the vocabulary. */
  tokenBytes(id: number): Uint8Array | undefined {
    const piece = this.#pieces[id];
    if (piece === undefined) return undefined;
    return piece.kind === 'bytes' ? piece.bytes : new TextEncoder().encode(piece.text);
  }

  isSpecial(id: number): boolean {
    return this.#special.has(id);
  }

  piece(id: number, skipSpecialTokens: boolean): TokenPiece | undefined {
    return skipSpecialTokens && this.#special.has(id) ? undefined : this.#pieces[id];
  }
}

/** What a server needs of a tokenizer; tests substitute one of bytes. */
export type TextModel = Pick<
  Tokenizer,
  | 'applyChatTemplate'
  | 'charactersPerToken'
  | 'chatTemplate'
  | 'decode'
  | 'decoder'
  | 'digest'
  | 'encode'
  | 'eosTokenId'
  | 'eosTokenIds'
  | 'tokenBytes'
  | 'tokenString'
>;

/** What stands beside tokenizer.json. */
async function readSettings(dir: string) {
  const settings = ((await readJson(join(dir, 'tokenizer_config.json'))) ?? {}) as Record<string, unknown>;
  return {
    settings,
    template: await readChatTemplate(dir, settings),
    model: await readModelConfig(dir),
  };
}

function noTokenizer(dir: string): PdError {
  return invalid(`${dir} holds no tokenizer.json`);
}

function openLibrary(json: unknown, settings: Record<string, unknown>, path: string): HuggingFaceTokenizer {
  try {
    return new HuggingFaceTokenizer(json as object, settings);
  } catch (cause) {
    throw invalid(`${path} cannot be used`, cause);
  }
}

function piecesOf(
  library: HuggingFaceTokenizer,
  added: readonly AddedToken[],
  read: (token: string) => TokenPiece,
): readonly (TokenPiece | undefined)[] {
  const pieces: (TokenPiece | undefined)[] = [];
  for (const [token, id] of library.get_vocab(false)) pieces[id] = read(token);
  for (const { id, content } of added) pieces[id] = { kind: 'text', text: content };
  return pieces;
}

/** `bos_token` and the like, as templates name them. */
function namedTokens(settings: Record<string, unknown>): Record<string, string> {
  const names = ['bos_token', 'eos_token', 'unk_token', 'pad_token', 'sep_token', 'cls_token', 'mask_token'];
  const tokens: Record<string, string> = {};
  for (const name of names) {
    const parsed = namedTokenSchema.safeParse(settings[name]);
    if (parsed.success) tokens[name] = parsed.data;
  }
  return tokens;
}
