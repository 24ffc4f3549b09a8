/** A conversation and its tools, as clients of OpenAI's API send them, and the text that the model's chat template makes of them. */
import { PdError } from '../../errors.ts';
import type { ChatMessage, RenderOptions, TextModel } from '../../model/tokenizer.ts';
import { z } from '../../zod.ts';
import { badField, contextExceeded, optional, type Served } from './fields.ts';

/** As OpenAI allows. */
const MAX_TOOLS = 128;
const MAX_CALLS = 128;

/** Names of parts that are text, in the chat's and in the Responses API. */
const TEXT_PARTS = ['text', 'input_text', 'output_text'];

/** Content as text, or as parts of which only text is read here. */
const content = z
  .union([z.string(), z.array(z.looseObject({ type: z.string(), text: optional(z.string()) })), z.null()], {
    error: 'expected text, or a list of {"type": "text"} parts',
  })
  // Behind the union, which would say its own error in place of these.
  .superRefine((value, check) => {
    for (const { type, text } of Array.isArray(value) ? value : []) {
      if (!TEXT_PARTS.includes(type)) {
        check.addIssue(`a part of type ${type.slice(0, 100)} is not supported: this model reads text alone`);
      } else if (text === undefined) {
        check.addIssue(`a part of type ${type} has no text`);
      }
    }
  })
  .optional()
  .transform((value) =>
    typeof value === 'string' ? value : (value ?? []).map((part) => part.text).join('\n'),
  );

/** Templates write arguments as JSON of an object, each in its own way; clients send them as text. */
const callArguments = z
  .union([z.string(), z.record(z.string(), z.unknown())], { error: 'expected a JSON object, as text' })
  .transform((given, check): Readonly<Record<string, unknown>> => {
    if (typeof given !== 'string') return given;
    try {
      const value: unknown = given.trim() === '' ? {} : JSON.parse(given);
      if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
        return value as Readonly<Record<string, unknown>>;
      }
    } catch {
      // said below
    }
    check.addIssue('expected a JSON object, as text');
    return z.NEVER;
  });

const call = z.looseObject({
  type: z.literal('function').default('function'),
  function: z.looseObject({ name: z.string().min(1), arguments: callArguments }),
});

export const messagesSchema = z
  .array(
    z
      .looseObject({
        role: z.string().min(1),
        content,
        tool_calls: z.array(call).max(MAX_CALLS).nullish(),
        reasoning: z.string().nullish(),
        reasoning_content: z.string().nullish(),
      })
      .transform(({ tool_calls, reasoning, reasoning_content, ...message }): ChatMessage => {
        const thoughts = reasoning_content ?? reasoning;
        return {
          ...message,
          // Templates ask whether there is such a key.
          ...(tool_calls && tool_calls.length > 0 && { tool_calls }),
          ...(thoughts && { reasoning_content: thoughts }),
        };
      }),
  )
  .min(1);

const functionTool = z.looseObject({
  type: z.literal('function', {
    error: ({ input }) =>
      `a tool of type ${JSON.stringify(input)?.slice(0, 100)} is not supported; only "function" is`,
  }),
  function: z.looseObject({
    name: z.string().regex(/^[\w.-]{1,64}$/, 'expected 1 to 64 letters, digits, _, - or .'),
    description: optional(z.string()),
    parameters: optional(z.record(z.string(), z.unknown())),
    strict: optional(z.boolean()),
  }),
});

const toolChoice = z.union(
  [
    z.enum(['none', 'auto', 'required']),
    z.object({ type: z.literal('function'), function: z.object({ name: z.string() }) }),
  ],
  { error: 'expected "none", "auto", "required" or {"type": "function", "function": {"name": ...}}' },
);

/** Fields that say what the template writes. */
export const conversationFields = {
  tools: optional(z.array(functionTool).max(MAX_TOOLS, `more than ${MAX_TOOLS} tools`)),
  tool_choice: optional(toolChoice),
  add_generation_prompt: optional(z.boolean()),
  continue_final_message: optional(z.boolean()),
  add_special_tokens: optional(z.boolean()),
  chat_template_kwargs: optional(z.record(z.string(), z.unknown())),
  reasoning_effort: optional(z.string()),
};

export type ConversationBody = z.output<z.ZodObject<typeof conversationFields>>;

/**
 * The tools that the model is told of: none where it may not call any. As they stand in the checked body: templates write them as JSON, and
 * zod puts the keys in another order.
 */
export function offeredTools(json: unknown, { tool_choice }: ConversationBody): readonly unknown[] {
  if (tool_choice === 'none') return [];
  return (json as { readonly tools?: readonly unknown[] | null }).tools ?? [];
}

/** Whose messages every template writes. */
const SPEAKERS = ['user', 'assistant'] as const;
/** Turns that are rendered to see what the template writes of one. */
const SAMPLED = 16;
/** Of each model: tokens of a message without content. */
const leastTokens = new WeakMap<TextModel, number>();

/**
 * Refuses more messages than fit, whatever they say, before time is spent on each of them. `json`: the body, of which nothing has been
 * checked. Throws CONTEXT_EXCEEDED.
 */
export function checkMessageCount(
  served: Served,
  model: TextModel,
  json: unknown,
  param: 'messages' | 'input',
): void {
  const { [param]: given, truncate_prompt_tokens: truncate } = (json ?? {}) as Record<string, unknown>;
  if (!Array.isArray(given) || given.length <= FEW_MESSAGES || typeof truncate === 'number') return;
  const spoken = given.filter((one: unknown) => SPEAKERS.some((role) => isSpokenBy(one, role))).length;
  const least = Math.floor(spoken * leastPerMessage(model));
  if (least <= served.maxModelLen) return;
  throw contextExceeded(served, param, `${given.length} messages, at least ${least} tokens,`, 0);
}

/** Read in some milliseconds. */
const FEW_MESSAGES = 512;

function isSpokenBy(message: unknown, role: string): boolean {
  if (typeof message !== 'object' || message === null) return false;
  const { role: own, type = 'message' } = message as { readonly role?: unknown; readonly type?: unknown };
  return own === role && type === 'message';
}

/** What a message adds that says nothing. 0: the template writes none. */
function leastPerMessage(model: TextModel): number {
  const known = leastTokens.get(model);
  if (known !== undefined) return known;
  const tokensOf = (turns: number): number => {
    const messages = Array.from({ length: turns }, () =>
      SPEAKERS.map((role) => ({ role, content: '' })),
    ).flat();
    return model.encode(model.applyChatTemplate(messages, { addGenerationPrompt: false }), {
      addSpecialTokens: false,
    }).length;
  };
  let least = 0;
  try {
    least = (tokensOf(2 * SAMPLED) - tokensOf(SAMPLED)) / (SAMPLED * SPEAKERS.length);
  } catch {
    // It has no template, or one that takes no such messages.
  }
  leastTokens.set(model, least);
  return least;
}

/** The conversation as the model's template writes it. Throws REQUEST_INVALID where there is none, or where it refuses. */
export function renderChat(
  model: TextModel,
  messages: readonly ChatMessage[],
  body: ConversationBody,
  tools: readonly unknown[],
): string {
  const { chatTemplate } = model;
  if (chatTemplate === undefined) throw badField('messages', 'this model has no chat template');
  const continueFinalMessage = body.continue_final_message ?? false;
  if (continueFinalMessage && body.add_generation_prompt) {
    throw badField('continue_final_message', 'is not allowed with add_generation_prompt: true');
  }
  if (tools.length > 0 && !chatTemplate.includes('tools')) {
    throw badField('tools', "this model's chat template has no place for them");
  }
  const variables = {
    ...(body.reasoning_effort !== undefined && { reasoning_effort: body.reasoning_effort }),
    ...body.chat_template_kwargs,
  };
  const options: RenderOptions = {
    addGenerationPrompt: body.add_generation_prompt ?? true,
    continueFinalMessage,
    variables,
    ...(tools.length > 0 && { tools }),
  };
  try {
    return model.applyChatTemplate(asTemplate(messages, chatTemplate), options);
  } catch (error) {
    const { message } = PdError.from(error);
    const told = `messages: ${message.slice(0, 1_000)}`;
    throw new PdError('REQUEST_INVALID', told, { param: 'messages' }, { cause: error });
  }
}

/** What OpenAI's newer models call a developer's message, templates call the system's. */
function asTemplate(messages: readonly ChatMessage[], template: string): readonly ChatMessage[] {
  if (template.includes('developer')) return messages;
  return messages.map((message) => (message.role === 'developer' ? { ...message, role: 'system' } : message));
}
