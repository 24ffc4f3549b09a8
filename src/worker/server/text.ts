/** What the server needs of a model's tokenizer. */

export interface TextDecoder {
  /** The text that is certain after this token: never half a character. */
  push(token: number): string;
  /** What was held back. */
  flush(): string;
}

export interface ChatMessage {
  readonly role: string;
  readonly content: string;
  readonly [key: string]: unknown;
}

export interface TextModel {
  /** End-of-sequence tokens, of tokenizer and generation config. */
  readonly eosTokenIds: readonly number[];
  readonly hasChatTemplate: boolean;
  /** Most UTF-16 units of text that one token stands for; Infinity where that cannot be told. */
  readonly charactersPerToken: number;
  encode(text: string, options?: { readonly addSpecialTokens?: boolean }): readonly number[];
  decode(tokens: readonly number[], options?: { readonly skipSpecialTokens?: boolean }): string;
  /** Text of one token by itself, special ones too. */
  tokenString(token: number): string;
  /** The token's bytes, where the tokenizer can tell: a token may be part of a character. */
  tokenBytes(token: number): Uint8Array | undefined;
  applyChatTemplate(
    messages: readonly ChatMessage[],
    options: { readonly addGenerationPrompt: boolean },
  ): string;
  /** A new incremental decoder, special tokens left out. */
  decoder(): TextDecoder;
}
