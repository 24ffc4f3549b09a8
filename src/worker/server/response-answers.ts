/** How the answers of /v1/responses are written: items of what the model has thought, said and called, whole or as the events of a stream. */
import { randomBytes } from 'node:crypto';
import { unreachable } from '../../errors.ts';
import type { TextModel } from '../../model/tokenizer.ts';
import { failedResponse, openAiError, type StreamEvent } from '../../openai-error.ts';
import type { Part } from '../../parsing/parts.ts';
import type { AnswerBase, AnswerFormat } from './answers.ts';
import { newCallId } from './chat.ts';
import type { ChoiceEvent, ChoiceLogprob, Usage } from './choice.ts';
import { chatLogprobs } from './logprobs.ts';
import type { ResponseReading } from './responses.ts';
import { turns } from './turns.ts';

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
  const done: object[] = [];
  let output: Output | undefined;
  /** Log-probabilities whose text the parser still holds. */
  let held: ChoiceLogprob[] = [];
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
    completed_at: status === 'completed' ? Math.floor(Date.now() / 1_000) : null,
    status,
    background: false,
    error: null,
    incomplete_details: status === 'incomplete' ? { reason: 'max_output_tokens' } : null,
    max_tool_calls: null,
    model: name,
    output: [...done],
    previous_response_id: null,
    service_tier: 'default',
    store: false,
    truncation: 'disabled',
    ...asked_for,
    usage: usage ? usageOf(usage) : null,
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
    finish = delta.finishReason ?? finish;
    const events: StreamEvent[] = [];
    for (const part of delta.parts) {
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
    broke: (error) => failedResponse(openAiError(error).error, sequence, response('in_progress')),
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

function usageOf(usage: Usage): object {
  return {
    input_tokens: usage.prompt_tokens,
    // OpenAI's clients require both. Nothing is written at a caller's cost.
    input_tokens_details: { ...usage.prompt_tokens_details, cache_write_tokens: 0 },
    output_tokens: usage.completion_tokens,
    output_tokens_details: usage.completion_tokens_details,
    total_tokens: usage.total_tokens,
  };
}
