/** POST /tokenize and /detokenize, in vLLM's shapes. */
import type { FastifyRequest } from 'fastify';
import { renderChat } from './chat.ts';
import { type ServerContext, servedModel } from './context.ts';
import { encodePrompt } from './generation.ts';
import { badField, detokenizeSchema, parseBody, tokenizeSchema } from './schemas.ts';

export function postTokenize(context: ServerContext, request: FastifyRequest): object {
  const body = parseBody(tokenizeSchema, request.body);
  servedModel(context, body.model);
  const { messages, prompt } = body;
  // A chat template writes the special tokens itself.
  const addSpecialTokens = body.add_special_tokens ?? messages === undefined;
  const text = messages ? renderChat(context, messages, body.add_generation_prompt ?? true) : (prompt ?? '');
  const tokens = encodePrompt(context, text, addSpecialTokens, messages ? 'messages' : 'prompt');
  return {
    count: tokens.length,
    max_model_len: context.core.info.maxModelLen,
    tokens,
    token_strs: body.return_token_strs ? tokens.map((token) => context.model.tokenString(token)) : null,
  };
}

export function postDetokenize(context: ServerContext, request: FastifyRequest): object {
  const body = parseBody(detokenizeSchema, request.body);
  servedModel(context, body.model);
  const { vocabSize } = context.core.info;
  const unknown = body.tokens.find((token) => token >= vocabSize);
  if (unknown !== undefined) {
    throw badField('tokens', `token id ${unknown} is not in the vocabulary of ${vocabSize}`);
  }
  return { prompt: context.model.decode(body.tokens, { skipSpecialTokens: false }) };
}
