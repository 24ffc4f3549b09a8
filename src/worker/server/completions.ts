/** /v1/completions: its body, and how its answers are written. */

import type { TextModel } from '../../model/tokenizer.ts';
import { unpackLogprobs } from '../../scheduler/prompt-logprobs.ts';
import { z } from '../../zod.ts';
import { type AnswerBase, type AnswerFormat, answerOfChoices } from './answers.ts';
import { type ChoiceEvent, type ChoiceLogprob, endOf, promptTokenIdsOf, tokenIdsOf } from './choice.ts';
import {
  askedOf,
  badField,
  checkPrompt,
  checkSampling,
  encodeText,
  MAX_LOGPROBS,
  MAX_PROMPTS,
  optional,
  parseBody,
  type Read,
  type ReadPrompt,
  type Served,
  samplingFields,
  servedModel,
  splitBody,
  tokenIds,
} from './fields.ts';
import { grammarFields, takeGrammar } from './grammar-fields.ts';
import { completionLogprobs, promptLogprobsOf } from './logprobs.ts';

const DEFAULT_MAX_TOKENS = 16;

export const promptForms = z
  .union([z.string(), z.array(z.string()).min(1), tokenIds.min(1), z.array(tokenIds.min(1)).min(1)], {
    error: 'expected a string, a list of strings, a list of token ids, or a list of lists of token ids',
  })
  .transform((prompt): readonly (string | readonly number[])[] => {
    if (typeof prompt === 'string') return [prompt];
    return typeof prompt[0] === 'number' ? [prompt as number[]] : (prompt as string[] | number[][]);
  })
  .refine((list) => list.length <= MAX_PROMPTS, `more than ${MAX_PROMPTS} prompts`);

/** One list of ids comes often and long, and a union of schemas tries each form on every id. */
export const prompts = z.unknown().transform((prompt, context): readonly (string | readonly number[])[] => {
  if (isIds(prompt)) return [prompt];
  const { success, data, error } = promptForms.safeParse(prompt);
  if (success) return data;
  for (const { message, path } of error.issues) {
    context.addIssue({ code: 'custom', message, path: path as (string | number)[] });
  }
  return z.NEVER;
});

function isIds(value: unknown): value is readonly number[] {
  return Array.isArray(value) && value.length > 0 && value.every((id) => Number.isSafeInteger(id) && id >= 0);
}

export const completionSchema = z.object({
  ...samplingFields,
  ...grammarFields,
  prompt: prompts,
  echo: optional(z.boolean()),
  logprobs: optional(z.int().min(0).max(MAX_LOGPROBS)),
  add_special_tokens: optional(z.boolean()),
});

export type CompletionReading = Read<Omit<z.output<typeof completionSchema>, keyof typeof grammarFields>>;

export function readCompletion(served: Served, model: TextModel, json: unknown): CompletionReading {
  const [{ prompt, ...given }, grammarWish] = takeGrammar(parseBody(completionSchema, json));
  const [body, constraints] = splitBody(given);
  const name = servedModel(served, body.model);
  const echo = body.echo ?? false;
  const maxTokens = body.max_tokens ?? DEFAULT_MAX_TOKENS;
  checkSampling(body, maxTokens);
  if (body.max_tokens === 0 && !echo) throw badField('max_tokens', 'must be at least 1 without echo');
  const output = Math.max(body.max_tokens ?? 1, 1);
  const prompts = prompt.map((given, index): ReadPrompt => {
    const param = prompt.length > 1 ? `prompt.${index}` : 'prompt';
    const options = { output, param, truncate: body.truncate_prompt_tokens };
    if (typeof given !== 'string') {
      const tokens = checkPrompt(served, given, options);
      return { text: echo ? model.decode(tokens, { skipSpecialTokens: false }) : '', tokens };
    }
    const ids = encodeText(served, model, given, body.add_special_tokens ?? true, options);
    const tokens = checkPrompt(served, ids, options);
    const whole = tokens.length === ids.length;
    const text = whole ? given : model.decode(tokens, { skipSpecialTokens: false });
    return { text: echo ? text : '', tokens };
  });
  const own = { prompts, maxTokens, echo, logprobs: body.logprobs, grammarWish };
  return { body, model: name, asked: askedOf(served, model, { ...body, ...constraints }, own) };
}

export function completionFormat(
  model: TextModel,
  { body }: CompletionReading,
  base: AnswerBase,
): AnswerFormat {
  const echo = body.echo ?? false;
  const choiceOf = async (index: number, events: readonly ChoiceEvent[]) => {
    const start = events[0]?.start;
    const echoed = echo ? start : undefined;
    return {
      index,
      text: (echoed?.prompt.text ?? '') + events.map(({ delta }) => delta.text).join(''),
      logprobs:
        body.logprobs === undefined
          ? null
          : await completionLogprobs(
              model,
              entriesOf(model, echoed, events),
              body.logprobs,
              echoed && { token: echoed.prompt.tokens[0]! },
              body.return_tokens_as_token_ids,
            ),
      ...endOf(events),
      ...(await promptLogprobsOf(model, body, start)),
      ...promptTokenIdsOf(body, events[0]),
      ...tokenIdsOf(body, events),
    };
  };
  return answerOfChoices(base, body.stream_options, {
    object: 'text_completion',
    chunkObject: 'text_completion',
    async deltas(event) {
      const { text, finishReason } = event.delta;
      const aboutPrompt = (echo || body.return_token_ids) && event.start !== undefined;
      if (text === '' && finishReason === undefined && !aboutPrompt) return [];
      return [await choiceOf(event.index, [event])];
    },
    whole: choiceOf,
  });
}

/** Log-probabilities of a choice, before them those of an echoed prompt from its second token on, each at where its text begins. */
function* entriesOf(
  model: TextModel,
  echoed: ChoiceEvent['start'],
  events: readonly ChoiceEvent[],
): Generator<ChoiceLogprob> {
  if (echoed?.promptLogprobs) {
    const decoder = model.decoder();
    let offset = decoder.push(echoed.prompt.tokens[0]!).length;
    for (const logprob of unpackLogprobs(echoed.promptLogprobs)) {
      yield { logprob, offset };
      offset += decoder.push(logprob.token).length;
    }
  }
  for (const { delta } of events) yield* delta.logprobs;
}
