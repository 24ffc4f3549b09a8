/** /v1/responses: its body, which becomes that of a chat. Nothing is stored, so nothing can be referred to. */
import { PdError } from '../../errors.ts';
import type { TextModel } from '../../model/tokenizer.ts';
import { z } from '../../zod.ts';
import { type ChatReading, readChat } from './chat.ts';
import {
  badField,
  type GrammarWish,
  MAX_LOGPROBS,
  NOT_DONE,
  optional,
  parseBody,
  type Served,
  samplingFields,
} from './fields.ts';
import { grammarFields } from './grammar-fields.ts';
import { checkMessageCount } from './messages.ts';

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

/** As OpenAI's. But for log-probabilities they are of what no answer here has, or, the thoughts, has in the clear. */
const INCLUDABLE = [
  'code_interpreter_call.outputs',
  'computer_call_output.output.image_url',
  'file_search_call.results',
  'message.input_image.image_url',
  LOGPROBS,
  'reasoning.encrypted_content',
  'web_search_call.action.sources',
  'web_search_call.results',
] as const;

/** Of what an answer repeats of its body: levels, which cross threads and are written one call within another, and characters as JSON. */
const MOST_LEVELS = 500;
const MOST_REPEATED = 2 ** 20;

const item = z.looseObject({ type: optional(z.string()), role: optional(z.string()) });

export const responseSchema = z.object({
  ...shared,
  input: z.union([z.string(), z.array(item).min(1)], 'expected text, or a list of items'),
  instructions: optional(z.string()),
  max_output_tokens: optional(z.int().min(1)),
  tools: optional(z.array(z.looseObject({ type: z.string() }))),
  tool_choice: optional(
    z.union(
      [
        z.enum(['none', 'auto', 'required']),
        z.looseObject({ type: z.literal('function'), name: z.string() }),
      ],
      { error: 'expected "none", "auto", "required" or {"type": "function", "name": ...}' },
    ),
  ),
  reasoning: optional(z.looseObject({ effort: optional(z.string()) })),
  text: optional(
    z.looseObject({
      format: optional(z.looseObject({ type: z.string() })),
      verbosity: optional(z.literal('medium', 'only "medium" is supported here')),
    }),
  ),
  include: optional(
    z.array(
      z.enum(INCLUDABLE, {
        error: ({ input }) =>
          `${JSON.stringify(input)?.slice(0, 100)} is not supported; supported are ${INCLUDABLE.join(', ')}`,
      }),
    ),
  ),
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
type AsSent<Body> = { readonly [Name in keyof Body]: Body[Name] | null };
type Item = z.output<typeof item>;

export interface ResponseReading extends ChatReading {
  /** What the answer says of its request. */
  readonly asked_for: object;
}

/** What the chat calls it, and this API. */
const NAMES = [
  ['messages', 'input'],
  ['max_completion_tokens', 'max_output_tokens'],
  ['response_format.json_schema', 'text.format'],
  ['response_format', 'text.format'],
  ['reasoning_effort', 'reasoning.effort'],
] as const;

export function readResponse(served: Served, model: TextModel, json: unknown): ResponseReading {
  checkMessageCount(served, model, json, 'input');
  const body = parseBody(responseSchema, json, RESPONSES_NOT_DONE);
  // As it was sent, null where it is to be as by default: what this API does not read itself, that of chats does.
  const given = json as Readonly<Record<string, unknown>> & AsSent<ResponseBody>;
  const { instructions, max_output_tokens, tools, tool_choice, reasoning, text, include } = given;
  const format = text?.format;
  const logprobs = include?.includes(LOGPROBS) || (body.top_logprobs ?? 0) > 0;
  const { messages, origins } = messagesOf(body);
  const chat = {
    ...Object.fromEntries(Object.keys(shared).map((name) => [name, given[name]])),
    messages,
    max_completion_tokens: max_output_tokens,
    tools: tools?.map(chatTool),
    tool_choice: typeof tool_choice === 'object' && tool_choice ? chatChoice(tool_choice) : tool_choice,
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
    presence_penalty: body.presence_penalty ?? 0,
    frequency_penalty: body.frequency_penalty ?? 0,
    top_logprobs: body.top_logprobs ?? 0,
    text: { ...text, format: format ?? { type: 'text' } },
    reasoning: { effort: null, summary: null, ...reasoning },
    metadata: given['metadata'] ?? {},
    user: given['user'] ?? null,
    safety_identifier: given['safety_identifier'] ?? null,
    prompt_cache_key: given['prompt_cache_key'] ?? null,
  };
  for (const [field, value] of Object.entries(asked_for)) checkRepeated(field, value);
  try {
    const { asked, ...reading } = readChat(served, model, chat);
    const { grammarWish: wish } = asked;
    // What is wrong with a form is found once it is built.
    const own = wish && { grammarWish: ownWish(wish, origins) };
    return { ...reading, asked: { ...asked, ...own }, asked_for };
  } catch (error) {
    throw inOwnWords(error, origins);
  }
}

function checkRepeated(field: string, value: unknown): void {
  if (nestsDeeper(value, MOST_LEVELS)) throw badField(field, `is nested deeper than ${MOST_LEVELS} levels`);
  if (JSON.stringify(value).length > MOST_REPEATED) {
    throw badField(field, `is longer than ${MOST_REPEATED} characters as JSON, and answers repeat it`);
  }
}

function nestsDeeper(value: unknown, levels: number): boolean {
  if (typeof value !== 'object' || value === null) return false;
  return levels === 0 || Object.values(value).some((one) => nestsDeeper(one, levels - 1));
}

/** A field of the chat by its name here. */
function ownName(param: string, origins: Origins): string {
  for (let end = param.length; end > 0; end = param.lastIndexOf('.', end - 1)) {
    const origin = origins.get(param.slice(0, end));
    if (origin !== undefined) return origin + param.slice(end);
  }
  const [name, ours] = NAMES.find(([name]) => param.startsWith(name)) ?? [];
  if (name !== undefined) return ours + param.slice(name.length);
  return param.replace(/^(tools\.\d+|tool_choice)\.function\b/, '$1');
}

function ownWish({ spec, param, unused }: GrammarWish, origins: Origins): GrammarWish {
  const rest = unused && { unused: ownWish(unused, origins) };
  return { spec, param: ownName(param, origins), ...rest };
}

/** An error about a field of the chat, by the name that the field has here. */
function inOwnWords(error: unknown, origins: Origins): unknown {
  if (!(error instanceof PdError)) return error;
  const param = error.context['param'];
  if (typeof param !== 'string') return error;
  const ours = ownName(param, origins);
  if (ours === param) return error;
  const message = error.message.replaceAll(param, ours);
  return new PdError(error.code, message, { ...error.context, param: ours }, { cause: error });
}

function chatTool({ type, ...declared }: { readonly type: string }): object {
  return type === 'function' ? { type, function: declared } : { type };
}

function chatChoice({ type, name }: { readonly type: string; readonly name: string }): object {
  return { type, function: { name } };
}

interface Turn {
  readonly role: string;
  readonly content: unknown;
  readonly tool_calls?: object[];
  readonly [key: string]: unknown;
}

/** Where a message of the chat, or a part of one, stands in the body: `messages.2.tool_calls.0.function` is `input.1`. */
type Origins = ReadonlyMap<string, string>;

/** Items as the messages of a chat: what the model has thought, said and called in one turn is one message. */
function messagesOf({ input, instructions }: ResponseBody): {
  readonly messages: readonly Turn[];
  readonly origins: Origins;
} {
  const messages: Turn[] = instructions === undefined ? [] : [{ role: 'system', content: instructions }];
  const origins = new Map<string, string>();
  if (typeof input === 'string')
    return { messages: [...messages, { role: 'user', content: input }], origins };
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
      case 'function_call_output': {
        const { call_id, output } = each as Item & Record<string, unknown>;
        if (output === undefined || output === null) throw badField(`input.${index}.output`, 'is missing');
        origins.set(`messages.${messages.length}.content`, `input.${index}.output`);
        messages.push({ role: 'tool', tool_call_id: call_id, content: output });
        break;
      }
      case 'item_reference':
        throw badField(`input.${index}`, 'nothing is stored here: send the item itself (store: false)');
      default:
        throw badField(`input.${index}`, `an item of type ${type.slice(0, 100)} is not supported`);
    }
    const last = `messages.${messages.length - 1}`;
    if (calls) origins.set(`${last}.tool_calls.${calls.length - 1}.function`, `input.${index}`);
    else if (type !== 'reasoning') origins.set(last, `input.${index}`);
  }
  return { messages, origins };
}

function textsOf(parts: unknown): string {
  const read = z.array(z.looseObject({ text: z.string() })).safeParse(parts);
  return read.success ? read.data.map(({ text }) => text).join('\n') : '';
}
