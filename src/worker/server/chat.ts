/** /v1/chat/completions: its body, and how its answers are written. */

import { PdError } from '../../errors.ts';
import type { ChatMessage, TextModel } from '../../model/tokenizer.ts';
import { z } from '../../zod.ts';
import { type AnswerFormat, type ChoiceEvent, promptTokenIdsOf, tokenIdsOf } from './choice.ts';
import {
  askedOf,
  badField,
  checkPrompt,
  checkSampling,
  encodeText,
  MAX_LOGPROBS,
  optional,
  parseBody,
  type Read,
  type Served,
  samplingFields,
  servedModel,
  splitBody,
} from './fields.ts';
import { chatLogprobs, promptLogprobsOf } from './logprobs.ts';

/** Content as text, or as parts of which only text is read here. */
const content = z
  .union([z.string(), z.array(z.object({ type: z.literal('text'), text: z.string() })), z.null()], {
    error: 'expected text, or a list of {"type": "text"} parts',
  })
  .optional()
  .transform((value) =>
    typeof value === 'string' ? value : (value ?? []).map((part) => part.text).join('\n'),
  );

export const messagesSchema = z.array(z.looseObject({ role: z.string().min(1), content })).min(1);

const chatSchema = z.object({
  ...samplingFields,
  messages: messagesSchema,
  max_completion_tokens: optional(z.int().min(0)),
  logprobs: optional(z.boolean()),
  top_logprobs: optional(z.int().min(0).max(MAX_LOGPROBS)),
  add_generation_prompt: optional(z.boolean()),
});

export type ChatReading = Read<z.output<typeof chatSchema>>;

export function readChat(served: Served, model: TextModel, json: unknown): ChatReading {
  const { messages, ...given } = parseBody(chatSchema, json);
  const [body, constraints] = splitBody(given);
  const name = servedModel(served, body.model);
  const maxTokens = body.max_completion_tokens ?? body.max_tokens;
  checkSampling(body, maxTokens);
  if (maxTokens === 0) {
    const field = body.max_completion_tokens === undefined ? 'max_tokens' : 'max_completion_tokens';
    throw badField(field, 'must be at least 1');
  }
  if (body.top_logprobs !== undefined && body.logprobs !== true) {
    throw badField('top_logprobs', 'is allowed only with logprobs: true');
  }
  const output = Math.max(maxTokens ?? 1, 1);
  const text = renderChat(model, messages, body.add_generation_prompt ?? true);
  // The template has written the special tokens itself.
  const ids = encodeText(served, model, text, false, output, 'messages');
  const prompts = [{ text: '', tokens: checkPrompt(served, ids, output, 'messages') }];
  const logprobs = body.logprobs ? (body.top_logprobs ?? 0) : undefined;
  const asked = askedOf(
    served,
    model,
    { ...body, ...constraints },
    { prompts, maxTokens, echo: false, logprobs },
  );
  return { body, model: name, asked };
}

/** The conversation as the model's template writes it. Throws REQUEST_INVALID where there is none, or where it refuses. */
export function renderChat(
  model: TextModel,
  messages: readonly ChatMessage[],
  addGenerationPrompt: boolean,
): string {
  if (!model.hasChatTemplate) throw badField('messages', 'this model has no chat template');
  try {
    return model.applyChatTemplate(messages, { addGenerationPrompt });
  } catch (error) {
    const { message } = PdError.from(error);
    const told = `messages: ${message.slice(0, 1_000)}`;
    throw new PdError('REQUEST_INVALID', told, { param: 'messages' }, { cause: error });
  }
}

export function chatFormat(model: TextModel, { body }: ChatReading): AnswerFormat {
  /** The fields after what is said. */
  const about = async (events: readonly ChoiceEvent[]) => ({
    logprobs: body.logprobs
      ? await chatLogprobs(
          model,
          events.flatMap(({ delta }) => delta.logprobs),
          body.top_logprobs ?? 0,
          body.return_tokens_as_token_ids,
        )
      : null,
    finish_reason: events.at(-1)?.delta.finishReason ?? null,
    ...tokenIdsOf(body, events),
  });
  return {
    object: 'chat.completion',
    chunkObject: 'chat.completion.chunk',
    async deltas(event) {
      const { index, start } = event;
      const { text, finishReason } = event.delta;
      const role = { role: 'assistant', content: '' };
      const opening = start ? [{ index, delta: role, logprobs: null, finish_reason: null }] : [];
      if (text === '' && finishReason === undefined) return opening;
      const delta = text === '' ? {} : { content: text };
      return [...opening, { index, delta, ...(await about([event])) }];
    },
    async whole(index, events) {
      const text = events.map(({ delta }) => delta.text).join('');
      return { index, message: { role: 'assistant', content: text }, ...(await about(events)) };
    },
    async besideChoices(event) {
      const ofPrompt = await promptLogprobsOf(model, body, event?.start);
      return { ...ofPrompt, ...promptTokenIdsOf(body, event) };
    },
  };
}
