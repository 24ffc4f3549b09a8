/** /v1/chat/completions: its body, and how its answers are written. */
import { randomBytes } from 'node:crypto';
import { unreachable } from '../../errors.ts';
import type { TextModel } from '../../model/tokenizer.ts';
import type { Parsing } from '../../parsing/parser.ts';
import type { Part } from '../../parsing/parts.ts';
import { opensThoughts } from '../../parsing/reasoning.ts';
import { z } from '../../zod.ts';
import { answerForm } from './answer-form.ts';
import { type AnswerBase, type AnswerFormat, answerOfChoices } from './answers.ts';
import { type ChoiceEvent, endOf, promptTokenIdsOf, tokenIdsOf } from './choice.ts';
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
import { grammarFields, takeGrammar } from './grammar-fields.ts';
import { chatLogprobs, promptLogprobsOf } from './logprobs.ts';
import {
  checkMessageCount,
  conversationFields,
  messagesSchema,
  offeredTools,
  renderChat,
} from './messages.ts';

export const chatSchema = z.object({
  ...samplingFields,
  ...grammarFields,
  ...conversationFields,
  messages: messagesSchema,
  max_completion_tokens: optional(z.int().min(0)),
  logprobs: optional(z.boolean()),
  top_logprobs: optional(z.int().min(0).max(MAX_LOGPROBS)),
  parallel_tool_calls: optional(z.boolean()),
  include_reasoning: optional(z.boolean()),
});

type ChatBody = z.output<typeof chatSchema>;

export interface ChatReading
  extends Read<Omit<ChatBody, 'tools' | 'chat_template_kwargs' | keyof typeof grammarFields>> {
  readonly parsing: Parsing;
}

export function readChat(served: Served, model: TextModel, json: unknown): ChatReading {
  checkMessageCount(served, model, json, 'messages');
  const [{ messages, ...given }, wish] = takeGrammar(parseBody(chatSchema, json));
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
  const tools = offeredTools(json, body);
  const calls = tools.length > 0 ? callsOf(served, body) : undefined;
  const output = Math.max(maxTokens ?? 1, 1);
  const text = renderChat(model, messages, body, tools);
  const { reasoning } = served;
  const parsing: Parsing = {
    ...(calls && { calls }),
    ...(reasoning && { reasoning: { dialect: reasoning, inside: opensThoughts(reasoning, text) } }),
  };
  const grammarWish = answerForm(body, parsing, wish);
  const options = { output, param: 'messages', truncate: body.truncate_prompt_tokens };
  // The template has written the special tokens itself.
  const ids = encodeText(served, model, text, body.add_special_tokens ?? false, options);
  const prompts = [{ text: '', tokens: checkPrompt(served, ids, options) }];
  const logprobs = body.logprobs ? (body.top_logprobs ?? 0) : undefined;
  const own = { prompts, maxTokens, echo: false, logprobs, grammarWish, parsing };
  const asked = askedOf(served, model, { ...body, ...constraints }, own);
  const { tools: _, chat_template_kwargs: __, ...kept } = body;
  return { body: kept, model: name, asked, parsing };
}

/** How calls of the tools are to be read. */
function callsOf(
  { calls }: Served,
  { tools = [], parallel_tool_calls: parallel }: Pick<ChatBody, 'tools' | 'parallel_tool_calls'>,
): Parsing['calls'] {
  const names = tools.map((tool) => tool.function.name);
  if (calls) return { dialect: calls, names, single: parallel === false };
  throw badField(
    'tools',
    'how this model writes calls is not known here: its chat template does not say (--tool-call-parser)',
  );
}

/** What a choice has said, as an answer of this API has it. */
interface Said {
  content: string;
  reasoning: string;
  readonly calls: Call[];
}

interface Call {
  readonly id: string;
  readonly name: string;
  arguments: string;
}

/** One choice on its way out. */
interface Speaking {
  /** Of what the parser still holds. */
  events: ChoiceEvent[];
  /** Calls that have begun. */
  calls: number;
}

export function chatFormat(model: TextModel, { body, parsing }: ChatReading, base: AnswerBase): AnswerFormat {
  const wantsReasoning = body.include_reasoning ?? true;
  const speaking = new Map<number, Speaking>();

  /** The fields after what is said. */
  const about = async (events: readonly ChoiceEvent[], calls: number) => ({
    logprobs: body.logprobs
      ? await chatLogprobs(
          model,
          events.flatMap(({ delta }) => delta.logprobs),
          body.top_logprobs ?? 0,
          body.return_tokens_as_token_ids,
        )
      : null,
    ...endOf(events),
    ...(calls > 0 && events.at(-1)?.delta.finishReason === 'stop' && { finish_reason: 'tool_calls' }),
    ...tokenIdsOf(body, events),
  });

  /** What a chunk of a stream says of one part; undefined where that is nothing. */
  const deltaOf = (part: Part, choice: Speaking): object | undefined => {
    switch (part.type) {
      case 'content':
        return { content: part.text };
      case 'reasoning':
        return wantsReasoning ? reasoningOf(part.text) : undefined;
      case 'call': {
        const index = choice.calls++;
        const { id, name } = newCall(part.name, parsing);
        return { tool_calls: [{ index, id, type: 'function', function: { name, arguments: '' } }] };
      }
      case 'arguments':
        return { tool_calls: [{ index: choice.calls - 1, function: { arguments: part.text } }] };
      case 'broken':
        return undefined; // what has gone out cannot be taken back
      default:
        return unreachable(part, 'part of an answer');
    }
  };

  return answerOfChoices(base, body.stream_options, {
    object: 'chat.completion',
    chunkObject: 'chat.completion.chunk',
    more: { service_tier: 'default' },
    async deltas(event) {
      const { index, start } = event;
      const choice = speaking.get(index) ?? { events: [], calls: 0 };
      speaking.set(index, choice);
      const role = { role: 'assistant', content: '', refusal: null };
      const opening = start ? [{ index, delta: role, logprobs: null, finish_reason: null }] : [];
      choice.events.push(event);
      const finished = event.delta.finishReason !== undefined;
      const deltas: object[] = [];
      for (const part of event.delta.parts) {
        const delta = deltaOf(part, choice);
        if (delta) deltas.push(delta);
      }
      if (deltas.length === 0 && !finished) return opening;
      const last = deltas.pop() ?? {};
      const { events } = choice;
      choice.events = [];
      if (finished) speaking.delete(index);
      return [
        ...opening,
        ...deltas.map((delta) => ({ index, delta, logprobs: null, finish_reason: null })),
        { index, delta: last, ...(await about(events, choice.calls)) },
      ];
    },
    async whole(index, events) {
      const { content, reasoning, calls } = saidIn(events, parsing);
      const silent = content === '' && (calls.length > 0 || reasoning !== '');
      const message = {
        role: 'assistant',
        content: silent ? null : content,
        refusal: null,
        annotations: [],
        ...(reasoning !== '' && wantsReasoning && reasoningOf(reasoning)),
        ...(calls.length > 0 && {
          tool_calls: calls.map(({ id, name, arguments: text }) => ({
            id,
            type: 'function',
            function: { name, arguments: text },
          })),
        }),
      };
      return { index, message, ...(await about(events, calls.length)) };
    },
    async besideChoices(event) {
      const ofPrompt = await promptLogprobsOf(model, body, event?.start);
      return { ...ofPrompt, ...promptTokenIdsOf(body, event) };
    },
  });
}

/** A whole choice. Here a call that broke can still become text. */
function saidIn(events: readonly ChoiceEvent[], parsing: Parsing): Said {
  const said: Said = { content: '', reasoning: '', calls: [] };
  for (const { delta } of events) for (const part of delta.parts) take(part, said, parsing);
  return said;
}

function take(part: Part, said: Said, parsing: Parsing): void {
  switch (part.type) {
    case 'content':
    case 'reasoning':
      said[part.type] += part.text;
      return;
    case 'call':
      said.calls.push(newCall(part.name, parsing));
      return;
    case 'arguments':
      said.calls.at(-1)!.arguments += part.text;
      return;
    case 'broken':
      said.calls.pop();
      said.content += part.text;
      return;
    default:
      unreachable(part, 'part of an answer');
  }
}

/** Under its older name and its newer one. */
function reasoningOf(text: string): object {
  return { reasoning_content: text, reasoning: text };
}

function newCall(name: string, parsing: Parsing): Call {
  return { id: newCallId(parsing), name, arguments: '' };
}

/** The templates of Mistral take ids of nine letters and digits alone. */
export function newCallId({ calls }: Parsing): string {
  const random = randomBytes(12).toString('hex');
  return calls?.dialect === 'mistral' ? random.slice(0, 9) : `call_${random}`;
}
