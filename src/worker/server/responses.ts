/** /v1/responses: its body, which becomes that of a chat, and how its answers are written. Nothing is stored, so nothing can be referred to. */
import { randomBytes } from 'node:crypto';
import { PdError, unreachable } from '../../errors.ts';
import type { TextModel } from '../../model/tokenizer.ts';
import { createParser } from '../../parsing/parser.ts';
import type { Part } from '../../parsing/parts.ts';
import { z } from '../../zod.ts';
import type { AnswerBase, AnswerFormat, StreamEvent } from './answers.ts';
import { type ChatReading, newCallId, readChat } from './chat.ts';
import type { ChoiceEvent, ChoiceLogprob, Usage } from './choice.ts';
import {
  badField,
  MAX_LOGPROBS,
  NOT_DONE,
  optional,
  parseBody,
  type Served,
  samplingFields,
} from './fields.ts';
import { grammarFields } from './grammar-fields.ts';
import { chatLogprobs } from './logprobs.ts';
import { turns } from './turns.ts';

/** Fields that mean in a chat what they mean here. */
const shared = z
  .object({
    ...samplingFields,
    parallel_tool_calls: optional(z.boolean()),
    chat_template_kwargs: optional(z.record(z.string(), z.unknown())),
    top_logprobs: optional(z.int().min(0).max(MAX_LOGPROBS)),
    structured_outputs: grammarFields.structured_outputs,
  })
  .omit({
    n: true,
    best_of: true,
    stream_options: true,
    prompt_logprobs: true,
    return_token_ids: true,
    return_tokens_as_token_ids: true,
  }).shape;

const LOGPROBS = 'message.output_text.logprobs';

const item = z.looseObject({ type: optional(z.string()), role: optional(z.string()) });

export const responseSchema = z.object({
  ...shared,
  input: z.union([z.string(), z.array(item).min(1)], 'expected text, or a list of items'),
  instructions: optional(z.string()),
  max_output_tokens: optional(z.int().min(1)),
  tools: optional(z.array(z.looseObject({ type: z.string() }))),
  tool_choice: optional(
    z.union([z.string(), z.looseObject({ type: z.string(), name: optional(z.string()) })], {
      error: 'expected "none", "auto", "required" or {"type": "function", "name": ...}',
    }),
  ),
  reasoning: optional(z.looseObject({ effort: optional(z.string()) })),
  text: optional(z.looseObject({ format: optional(z.looseObject({ type: z.string() })) })),
  include: optional(z.array(z.string())),
});

/** Fields of this API that are not done, with the values that ask for nothing. */
export const RESPONSES_NOT_DONE: typeof NOT_DONE = {
  ...NOT_DONE,
  previous_response_id: [],
  conversation: [],
  prompt: [],
  background: [false],
  truncation: ['disabled'],
  max_tool_calls: [],
  n: [1],
  best_of: [1],
  prompt_logprobs: [],
  response_format: [],
  guided_json: [],
  guided_regex: [],
  guided_choice: [],
  guided_grammar: [],
};

type ResponseBody = z.output<typeof responseSchema>;
type Item = z.output<typeof item>;

export interface ResponseReading extends ChatReading {
  /** What the answer says of its request. */
  readonly asked_for: object;
}

/** What the chat calls it, and this API. */
const NAMES = [
  ['messages', 'input'],
  ['max_completion_tokens', 'max_output_tokens'],
  ['response_format', 'text.format'],
  ['reasoning_effort', 'reasoning.effort'],
] as const;

export function readResponse(served: Served, model: TextModel, json: unknown): ResponseReading {
  const body = parseBody(responseSchema, json, RESPONSES_NOT_DONE);
  // As it was sent: what this API does not read itself, that of chats does.
  const given = json as Readonly<Record<string, unknown>> & ResponseBody;
  const { instructions, max_output_tokens, tools, tool_choice, reasoning, text, include } = given;
  const format = text?.format;
  const logprobs = include?.includes(LOGPROBS) || (body.top_logprobs ?? 0) > 0;
  const chat = {
    ...Object.fromEntries(Object.keys(shared).map((name) => [name, given[name]])),
    messages: messagesOf(body),
    max_completion_tokens: max_output_tokens,
    tools: tools?.map(chatTool),
    tool_choice: typeof tool_choice === 'object' ? chatChoice(tool_choice) : tool_choice,
    reasoning_effort: reasoning?.effort,
    response_format: format?.type === 'json_schema' ? { type: format.type, json_schema: format } : format,
    ...(logprobs ? { logprobs: true } : { top_logprobs: undefined }),
  };
  const asked_for = {
    instructions: instructions ?? null,
    max_output_tokens: max_output_tokens ?? null,
    tools: tools ?? [],
    tool_choice: tool_choice ?? 'auto',
    parallel_tool_calls: body.parallel_tool_calls ?? true,
    temperature: body.temperature ?? 1,
    top_p: body.top_p ?? 1,
    top_logprobs: body.top_logprobs ?? 0,
    text: { ...text, format: format ?? { type: 'text' } },
    reasoning: { effort: null, summary: null, ...reasoning },
    metadata: given['metadata'] ?? {},
    user: given['user'] ?? null,
  };
  try {
    return { ...readChat(served, model, chat), asked_for };
  } catch (error) {
    throw inOwnWords(error);
  }
}

/** An error about a field of the chat, by the name that the field has here. */
function inOwnWords(error: unknown): unknown {
  if (!(error instanceof PdError)) return error;
  const param = error.context['param'];
  const [theirs, ours] = NAMES.find(([name]) => typeof param === 'string' && param.startsWith(name)) ?? [];
  if (theirs === undefined) return error;
  const message = error.message.replaceAll(theirs, ours);
  return new PdError(error.code, message, { ...error.context, param: ours }, { cause: error });
}

function chatTool({ type, ...declared }: { readonly type: string }): object {
  return type === 'function' ? { type, function: declared } : { type };
}

function chatChoice({ type, name }: { readonly type: string; readonly name?: string | undefined }): object {
  return type === 'function' ? { type, function: { name } } : { type };
}

interface Turn {
  readonly role: string;
  readonly content: unknown;
  readonly tool_calls?: object[];
  readonly [key: string]: unknown;
}

/** Items as the messages of a chat: what the model has thought, said and called in one turn is one message. */
function messagesOf({ input, instructions }: ResponseBody): Turn[] {
  const messages: Turn[] = instructions === undefined ? [] : [{ role: 'system', content: instructions }];
  if (typeof input === 'string') return [...messages, { role: 'user', content: input }];
  let thoughts = '';
  const said = (content: unknown, calls?: object[]) => {
    messages.push({
      role: 'assistant',
      content,
      ...(thoughts !== '' && { reasoning_content: thoughts }),
      ...(calls && { tool_calls: calls }),
    });
    thoughts = '';
  };
  let calls: object[] | undefined;
  for (const [index, each] of input.entries()) {
    const { type = 'message', role } = each;
    if (type !== 'function_call') calls = undefined;
    switch (type) {
      case 'message':
        if (role === 'assistant') said(each['content']);
        else messages.push({ role: role ?? '', content: each['content'] });
        break;
      case 'reasoning':
        thoughts += textsOf(each['content']) || textsOf(each['summary']);
        break;
      case 'function_call': {
        const { call_id: id, name, arguments: text } = each as Item & Record<string, unknown>;
        const call = { id, type: 'function', function: { name, arguments: text } };
        const last = messages.at(-1);
        if (calls) {
          calls.push(call);
        } else if (last?.role === 'assistant' && thoughts === '') {
          calls = [call];
          messages[messages.length - 1] = { ...last, tool_calls: calls };
        } else {
          calls = [call];
          said('', calls);
        }
        break;
      }
      case 'function_call_output':
        messages.push({ role: 'tool', tool_call_id: each['call_id'], content: each['output'] });
        break;
      case 'item_reference':
        throw badField(`input.${index}`, 'nothing is stored here: send the item itself (store: false)');
      default:
        throw badField(`input.${index}`, `an item of type ${type.slice(0, 100)} is not supported`);
    }
  }
  return messages;
}

function textsOf(parts: unknown): string {
  const read = z.array(z.looseObject({ text: z.string() })).safeParse(parts);
  return read.success ? read.data.map(({ text }) => text).join('\n') : '';
}

/** An item of the answer, under way. */
type Output =
  | { readonly type: 'message'; readonly id: string; text: string; logprobs: object[] }
  | { readonly type: 'reasoning'; readonly id: string; text: string }
  | {
      readonly type: 'function_call';
      readonly id: string;
      readonly callId: string;
      readonly name: string;
      text: string;
    };

type Status = 'in_progress' | 'completed' | 'incomplete';

const PREFIXES = { message: 'msg', reasoning: 'rs', function_call: 'fc' } as const;

export function responseFormat(
  model: TextModel,
  { body, parsing, asked_for }: ResponseReading,
  { id, created, model: name }: AnswerBase,
): AnswerFormat {
  const parser = createParser(parsing);
  const parallel = body.parallel_tool_calls ?? true;
  const done: object[] = [];
  let output: Output | undefined;
  /** Log-probabilities whose text the parser still holds. */
  let held: ChoiceLogprob[] = [];
  let calls = 0;
  let reasoningTokens = 0;
  let finish: 'stop' | 'length' = 'stop';
  let sequence = 0;

  const event = (type: string, data: object, long = false): StreamEvent => ({
    name: type,
    data: { type, sequence_number: sequence++, ...data },
    long,
  });
  const response = (status: Status, usage?: Usage) => ({
    id,
    object: 'response',
    created_at: created,
    status,
    background: false,
    error: null,
    incomplete_details: status === 'incomplete' ? { reason: 'max_output_tokens' } : null,
    model: name,
    output: [...done],
    previous_response_id: null,
    service_tier: 'default',
    store: false,
    truncation: 'disabled',
    ...asked_for,
    usage: usage ? usageOf(usage, reasoningTokens) : null,
  });
  /** Where deltas of the item under way belong. */
  const place = (of: Output) => ({
    item_id: of.id,
    output_index: done.length,
    ...(of.type !== 'function_call' && { content_index: 0 }),
  });

  function open(next: Output): StreamEvent[] {
    const events = close('completed');
    output = next;
    events.push(
      event('response.output_item.added', { output_index: done.length, item: itemOf(next, 'in_progress') }),
    );
    if (next.type !== 'function_call') {
      events.push(
        event('response.content_part.added', { ...place(next), part: partOf({ ...next, text: '' }) }),
      );
    }
    return events;
  }

  function close(status: Status): StreamEvent[] {
    if (!output) return [];
    const of = output;
    const events: StreamEvent[] = [];
    const { text } = of;
    if (of.type === 'function_call') {
      const { name } = of;
      events.push(event('response.function_call_arguments.done', { ...place(of), name, arguments: text }));
    } else {
      const logprobs = of.type === 'message' ? { logprobs: of.logprobs } : {};
      const kind = of.type === 'message' ? 'output_text' : 'reasoning_text';
      events.push(
        event(`response.${kind}.done`, { ...place(of), text, ...logprobs }, true),
        event('response.content_part.done', { ...place(of), part: partOf(of) }, true),
      );
    }
    const item = itemOf(of, status);
    events.push(event('response.output_item.done', { output_index: done.length, item }, true));
    done.push(item);
    output = undefined;
    return events;
  }

  async function take(part: Part): Promise<readonly StreamEvent[]> {
    switch (part.type) {
      case 'reasoning':
      case 'content': {
        const type = part.type === 'content' ? 'message' : 'reasoning';
        if (type === 'reasoning' && body.include_reasoning === false) return [];
        const events = output?.type === type ? [] : open(newOutput(type));
        const of = output!;
        of.text += part.text;
        const data = { ...place(of), delta: part.text };
        if (of.type !== 'message') return [...events, event('response.reasoning_text.delta', data)];
        const told = body.logprobs ? (await chatLogprobs(model, held, body.top_logprobs ?? 0)).content : [];
        held = [];
        of.logprobs.push(...told);
        return [...events, event('response.output_text.delta', { ...data, logprobs: told })];
      }
      case 'call': {
        if (++calls > 1 && !parallel) return [];
        const callId = newCallId(parsing);
        return open({ type: 'function_call', id: newId('function_call'), callId, name: part.name, text: '' });
      }
      case 'arguments':
        if (output?.type !== 'function_call') return [];
        output.text += part.text;
        return [event('response.function_call_arguments.delta', { ...place(output), delta: part.text })];
      case 'broken':
        return output?.type === 'function_call' ? close('incomplete') : [];
      default:
        return unreachable(part, 'part of an answer');
    }
  }

  async function said({ delta }: ChoiceEvent): Promise<readonly StreamEvent[]> {
    held.push(...delta.logprobs);
    const parts = parser.push(delta.text);
    if (delta.finishReason) {
      finish = delta.finishReason;
      parts.push(...parser.flush());
    }
    const last = parts.at(-1) ?? { type: output?.type };
    if (last.type === 'reasoning') reasoningTokens += delta.tokens.length;
    const events: StreamEvent[] = [];
    for (const part of parts) {
      // A call ends where something else begins: its arguments are whole then.
      if (part.type === 'content' && output?.type === 'function_call') events.push(...close('completed'));
      events.push(...(await take(part)));
    }
    return events;
  }

  return {
    async whole([events = []], usage) {
      const turn = turns();
      for (const each of events) {
        await said(each);
        await turn();
      }
      const status = finish === 'length' ? 'incomplete' : 'completed';
      close(status);
      return response(status, usage);
    },
    begin: () => [
      event('response.created', { response: response('in_progress') }, true),
      event('response.in_progress', { response: response('in_progress') }, true),
    ],
    said,
    end(usage) {
      const status = finish === 'length' ? 'incomplete' : 'completed';
      const closing = close(status);
      return [...closing, event(`response.${status}`, { response: response(status, usage) }, true)];
    },
    broke({ code, message, context }) {
      return [event('error', { code, message, param: context['param'] ?? null })];
    },
  };
}

function newId(type: Output['type']): string {
  return `${PREFIXES[type]}_${randomBytes(16).toString('hex')}`;
}

function newOutput(type: 'message' | 'reasoning'): Output {
  const id = newId(type);
  return type === 'message' ? { type, id, text: '', logprobs: [] } : { type, id, text: '' };
}

function partOf(output: Exclude<Output, { type: 'function_call' }>): object {
  const { type, text } = output;
  return type === 'message'
    ? { type: 'output_text', text, annotations: [], logprobs: output.text === '' ? [] : output.logprobs }
    : { type: 'reasoning_text', text };
}

function itemOf(output: Output, status: Status): object {
  const { type, id, text } = output;
  switch (type) {
    case 'message': {
      const content = status === 'in_progress' ? [] : [partOf(output)];
      return { id, type, status, role: 'assistant', content };
    }
    case 'reasoning':
      return { id, type, status, summary: [], content: status === 'in_progress' ? [] : [partOf(output)] };
    case 'function_call':
      return { id, type, status, call_id: output.callId, name: output.name, arguments: text };
    default:
      return unreachable(output, 'item of an answer');
  }
}

function usageOf(
  { prompt_tokens, prompt_tokens_details, completion_tokens, total_tokens }: Usage,
  reasoningTokens: number,
): object {
  return {
    input_tokens: prompt_tokens,
    input_tokens_details: prompt_tokens_details,
    output_tokens: completion_tokens,
    output_tokens_details: { reasoning_tokens: reasoningTokens },
    total_tokens,
  };
}
