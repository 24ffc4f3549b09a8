/** /tokenize and /detokenize, in vLLM's shapes: their bodies, and their answers as JSON in UTF-8. */

import type { TextModel } from '../../model/tokenizer.ts';
import { z } from '../../zod.ts';
import {
  checkVocabulary,
  encodeText,
  optional,
  parseBody,
  type Served,
  servedModel,
  tokenIds,
} from './fields.ts';
import { conversationFields, messagesSchema, offeredTools, renderChat } from './messages.ts';

export const tokenizeSchema = z
  .object({
    model: optional(z.string()),
    prompt: optional(z.string()),
    messages: optional(messagesSchema),
    ...conversationFields,
    return_token_strs: optional(z.boolean()),
  })
  .refine((body) => (body.prompt === undefined) !== (body.messages === undefined), {
    message: 'expected either prompt or messages',
    path: ['prompt'],
  });

export const detokenizeSchema = z.object({ model: optional(z.string()), tokens: tokenIds });

export function readTokenize(served: Served, model: TextModel, json: unknown): Uint8Array<ArrayBuffer> {
  const body = parseBody(tokenizeSchema, json);
  servedModel(served, body.model);
  const { messages, prompt } = body;
  // A chat template writes the special tokens itself.
  const addSpecialTokens = body.add_special_tokens ?? messages === undefined;
  const text = messages ? renderChat(model, messages, body, offeredTools(json, body)) : (prompt ?? '');
  const tokens = encodeText(served, model, text, addSpecialTokens, {
    output: 0,
    param: messages ? 'messages' : 'prompt',
    counted: true,
  });
  return utf8Json({
    count: tokens.length,
    max_model_len: served.maxModelLen,
    tokens,
    token_strs: body.return_token_strs ? tokens.map((token) => model.tokenString(token)) : null,
  });
}

export function readDetokenize(served: Served, model: TextModel, json: unknown): Uint8Array<ArrayBuffer> {
  const body = parseBody(detokenizeSchema, json);
  servedModel(served, body.model);
  checkVocabulary(served, body.tokens, 'tokens');
  return utf8Json({ prompt: model.decode(body.tokens, { skipSpecialTokens: false }) });
}

function utf8Json(answer: object): Uint8Array<ArrayBuffer> {
  return new TextEncoder().encode(JSON.stringify(answer));
}
