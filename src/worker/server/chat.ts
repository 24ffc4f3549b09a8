/** POST /v1/chat/completions. */
import type { FastifyReply, FastifyRequest } from 'fastify';
import { PdError } from '../../errors.ts';
import { type ServerContext, servedModel } from './context.ts';
import {
  type ChoiceEvent,
  checkPrompt,
  encodePrompt,
  GenerationRun,
  type Plan,
  prefillOf,
  promptTokenIdsOf,
  samplingOf,
  tokenIdsOf,
} from './generation.ts';
import { chatLogprobs } from './logprobs.ts';
import { requestIdOf } from './request-id.ts';
import { type AnswerFormat, respond } from './respond.ts';
import { badField, type ChatBody, chatSchema, checkSampling, parseBody } from './schemas.ts';
import type { ChatMessage } from './text.ts';

export async function postChatCompletions(
  context: ServerContext,
  request: FastifyRequest,
  reply: FastifyReply,
): Promise<object | undefined> {
  const id = `chatcmpl-${requestIdOf(request, reply)}`;
  const leave = context.inFlight.enter(id);
  try {
    const body = parseBody(chatSchema, request.body);
    const model = servedModel(context, body.model);
    const plan = { ...planOf(context, body, id), ...prefillOf(context, request) };
    return await respond(context, reply, new GenerationRun(context, plan), format(context, body, id, model), {
      stream: body.stream ?? false,
      includeUsage: body.stream_options?.include_usage ?? false,
      choices: plan.n,
      id,
    });
  } finally {
    leave();
  }
}

/** The conversation as the model's template writes it. Throws REQUEST_INVALID where there is none, or where it refuses. */
export function renderChat(
  context: ServerContext,
  messages: readonly ChatMessage[],
  addGenerationPrompt: boolean,
): string {
  if (!context.model.hasChatTemplate) throw badField('messages', 'this model has no chat template');
  try {
    return context.model.applyChatTemplate(messages, { addGenerationPrompt });
  } catch (error) {
    const { message } = PdError.from(error);
    throw new PdError('REQUEST_INVALID', `messages: ${message}`, { param: 'messages' }, { cause: error });
  }
}

function planOf(context: ServerContext, body: ChatBody, id: string): Plan {
  const maxTokens = body.max_completion_tokens ?? body.max_tokens;
  checkSampling(body, maxTokens);
  if (maxTokens === 0) {
    const field = body.max_completion_tokens === undefined ? 'max_tokens' : 'max_completion_tokens';
    throw badField(field, 'must be at least 1');
  }
  if (body.top_logprobs !== undefined && body.logprobs !== true) {
    throw badField('top_logprobs', 'is allowed only with logprobs: true');
  }
  const text = renderChat(context, body.messages, body.add_generation_prompt ?? true);
  // The template has written the special tokens itself.
  const tokens = checkPrompt(context, encodePrompt(context, text, false, 'messages'), maxTokens, 'messages');
  return {
    prompts: [{ text, tokens, serverId: id }],
    n: body.n ?? 1,
    sampling: samplingOf(context, body, body.logprobs ? (body.top_logprobs ?? 0) : undefined, false),
    maxTokens,
    stops: body.stop ?? [],
    echo: false,
  };
}

function format(context: ServerContext, body: ChatBody, id: string, model: string): AnswerFormat {
  const created = Math.floor(Date.now() / 1_000);
  const whole = { id, object: 'chat.completion', created, model };
  const chunk = { ...whole, object: 'chat.completion.chunk' };
  const withUsage = body.stream_options?.include_usage === true ? { usage: null } : {};
  const logprobsOf = (events: readonly ChoiceEvent[]) =>
    body.logprobs
      ? chatLogprobs(
          context.model,
          events.flatMap(({ delta }) => delta.logprobs),
          body.top_logprobs ?? 0,
          body.return_tokens_as_token_ids,
        )
      : null;
  const chunkOf = (choice: object, aboutPrompt: object = {}) => ({
    ...chunk,
    ...aboutPrompt,
    choices: [choice],
    ...withUsage,
  });
  return {
    chunks(event) {
      const { index, start } = event;
      const { text, finishReason } = event.delta;
      const opening = {
        index,
        delta: { role: 'assistant', content: '' },
        logprobs: null,
        finish_reason: null,
      };
      const role = start ? [chunkOf(opening, promptTokenIdsOf(body, event))] : [];
      if (text === '' && finishReason === undefined) return role;
      const choice = {
        index,
        delta: text === '' ? {} : { content: text },
        logprobs: logprobsOf([event]),
        finish_reason: finishReason ?? null,
        ...tokenIdsOf(body, [event]),
      };
      return [...role, chunkOf(choice)];
    },
    usageChunk: (usage) => ({ ...chunk, choices: [], usage }),
    whole: (events, usage) => ({
      ...whole,
      ...promptTokenIdsOf(body, events[0]?.[0]),
      choices: events.map((list, index) => ({
        index,
        message: { role: 'assistant', content: list.map(({ delta }) => delta.text).join('') },
        logprobs: logprobsOf(list),
        finish_reason: list.at(-1)?.delta.finishReason ?? null,
        ...tokenIdsOf(body, list),
      })),
      usage,
    }),
  };
}
