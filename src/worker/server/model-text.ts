/** The server's view of a checkpoint's tokenizer. */
import { IncrementalDecoder, Tokenizer } from '../../model/tokenizer.ts';
import type { TextModel } from './text.ts';

/** Reads tokenizer, chat template and end-of-sequence tokens of a checkpoint. Throws CHECKPOINT_INVALID. */
export async function loadTextModel(modelDir: string): Promise<TextModel> {
  const tokenizer = await Tokenizer.load(modelDir);
  return {
    eosTokenIds: tokenizer.eosTokenIds,
    charactersPerToken: tokenizer.charactersPerToken,
    hasChatTemplate: tokenizer.hasChatTemplate,
    encode: (text, options) => tokenizer.encode(text, options),
    decode: (tokens, options) => tokenizer.decode(tokens, options),
    tokenString: (token) => tokenizer.tokenString(token),
    tokenBytes: (token) => tokenizer.tokenBytes(token),
    applyChatTemplate: (messages, options) => tokenizer.applyChatTemplate(messages, options),
    decoder: () => new IncrementalDecoder(tokenizer),
  };
}
