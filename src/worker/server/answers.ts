/** How one API writes its answers, and the form that chats and completions share: a list of choices. */
import type { PdError } from '../../errors.ts';
import { openAiError, type StreamEvent } from '../../openai-error.ts';
import type { ChoiceEvent, Usage } from './choice.ts';
import type { SamplingBody } from './fields.ts';
import { turns } from './turns.ts';

/** What one answer is written by. Used once. */
export interface AnswerFormat {
  /** `choices`: the events of each, in order. */
  whole(choices: readonly (readonly ChoiceEvent[])[], usage: Usage): Promise<object>;
  /** A stream: `begin`, what each event says, and `end` or `broke`. */
  begin(): readonly StreamEvent[];
  said(event: ChoiceEvent): Promise<readonly StreamEvent[]>;
  end(usage: Usage): readonly StreamEvent[];
  broke(error: PdError): readonly StreamEvent[];
  /** Ends the stream, however it went. */
  readonly last?: string;
}

type StreamOptions = Partial<NonNullable<SamplingBody['stream_options']>>;

export interface AnswerBase {
  readonly id: string;
  readonly created: number;
  readonly model: string;
  /** `system_fingerprint`: of one that draws the same from the same seed. */
  readonly fingerprint: string;
}

export interface ChoicesFormat {
  /** `object` of a whole answer, and of a chunk of a stream. */
  readonly object: string;
  readonly chunkObject: string;
  /** What a stream says of one event, each in a chunk of its own. */
  deltas(event: ChoiceEvent): Promise<readonly object[]>;
  /** A whole choice, of its events in order. */
  whole(index: number, events: readonly ChoiceEvent[]): Promise<object>;
  /** Beside what all answers and chunks have. */
  readonly more?: object;
  /** Beside the choices of an answer or chunk that begins with this event. */
  besideChoices?(event: ChoiceEvent | undefined): Promise<object>;
}

/** With `include_usage` a stream ends with its usage; with `continuous_usage_stats` too each chunk has its choice's so far, as vLLM writes it. */
export function answerOfChoices(
  { id, created, model, fingerprint }: AnswerBase,
  { include_usage: includeUsage = false, continuous_usage_stats: continuous = false }: StreamOptions = {},
  format: ChoicesFormat,
): AnswerFormat {
  const own = { created, model, ...format.more, system_fingerprint: fingerprint };
  const base = (object: string) => ({ id, object, ...own });
  const chunk = base(format.chunkObject);
  const counted = new Map<number, { readonly prompt: number; readonly completion: number }>();
  const usageOf = ({ index, start, delta }: ChoiceEvent): object => {
    if (!includeUsage) return {};
    if (!continuous) return { usage: null };
    const before = counted.get(index) ?? { prompt: start?.prompt.tokens.length ?? 0, completion: 0 };
    const { prompt, completion } = { ...before, completion: before.completion + delta.tokens.length };
    counted.set(index, { prompt, completion });
    const usage = { prompt_tokens: prompt, total_tokens: prompt + completion, completion_tokens: completion };
    return { usage };
  };
  return {
    async whole(byChoice, usage) {
      const choices: object[] = [];
      const turn = turns();
      for (const [index, events] of byChoice.entries()) {
        choices.push(await format.whole(index, events));
        await turn();
      }
      const beside = await format.besideChoices?.(byChoice[0]?.[0]);
      return { ...base(format.object), ...beside, choices, usage };
    },
    begin: () => [],
    async said(event) {
      const beside = await format.besideChoices?.(event);
      const deltas = await format.deltas(event);
      const usage = usageOf(event);
      return deltas.map((choice, i) => ({
        data: { ...chunk, ...(i === 0 && beside), choices: [choice], ...usage },
        long: event.start !== undefined,
      }));
    },
    end(usage) {
      if (!includeUsage) return [];
      return [{ data: { ...chunk, choices: [], usage } }];
    },
    broke: (error) => [{ data: openAiError(error) }],
    last: '[DONE]',
  };
}
