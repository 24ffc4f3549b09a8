/** POST /v1/completions. */
import type { FastifyReply, FastifyRequest } from 'fastify';
import type { ChoiceLogprob } from './choice.ts';
import { type ServerContext, servedModel } from './context.ts';
import {
  type ChoiceEvent,
  checkPrompt,
  encodePrompt,
  GenerationRun,
  type Plan,
  type Prompt,
  prefillOf,
  promptTokenIdsOf,
  samplingOf,
  tokenIdsOf,
} from './generation.ts';
import { completionLogprobs } from './logprobs.ts';
import { requestIdOf } from './request-id.ts';
import { type AnswerFormat, respond } from './respond.ts';
import { badField, type CompletionBody, checkSampling, completionSchema, parseBody } from './schemas.ts';

const DEFAULT_MAX_TOKENS = 16;

export async function postCompletions(
  context: ServerContext,
  request: FastifyRequest,
  reply: FastifyReply,
): Promise<object | undefined> {
  const id = `cmpl-${requestIdOf(request, reply)}`;
  const leave = context.inFlight.enter(id);
  try {
    const body = parseBody(completionSchema, request.body);
    const model = servedModel(context, body.model);
    const plan = { ...planOf(context, body, id), ...prefillOf(context, request) };
    return await respond(context, reply, new GenerationRun(context, plan), format(context, body, id, model), {
      stream: body.stream ?? false,
      includeUsage: body.stream_options?.include_usage ?? false,
      choices: plan.prompts.length * plan.n,
      id,
    });
  } finally {
    leave();
  }
}

function planOf(context: ServerContext, body: CompletionBody, id: string): Plan {
  const echo = body.echo ?? false;
  checkSampling(body, body.max_tokens);
  if (body.max_tokens === 0 && !echo) throw badField('max_tokens', 'must be at least 1 without echo');
  const prompts = body.prompt.map((given, index): Prompt => {
    const param = body.prompt.length > 1 ? `prompt.${index}` : 'prompt';
    const isText = typeof given === 'string';
    const tokens = isText ? encodePrompt(context, given, body.add_special_tokens ?? true, param) : given;
    const checked = checkPrompt(context, tokens, body.max_tokens, param);
    const text = isText ? given : echo ? context.model.decode(given, { skipSpecialTokens: false }) : '';
    return { text, tokens: checked, serverId: `${id}-${index}` };
  });
  return {
    prompts,
    n: body.n ?? 1,
    sampling: samplingOf(context, body, body.logprobs, echo),
    maxTokens: body.max_tokens ?? DEFAULT_MAX_TOKENS,
    stops: body.stop ?? [],
    echo,
  };
}

function format(context: ServerContext, body: CompletionBody, id: string, model: string): AnswerFormat {
  const base = { id, object: 'text_completion', created: Math.floor(Date.now() / 1_000), model };
  const withUsage = body.stream_options?.include_usage === true ? { usage: null } : {};
  const echo = body.echo ?? false;

  const choiceOf = (index: number, events: readonly ChoiceEvent[]) => {
    const start = events[0]?.start;
    const echoed = echo && start ? start.prompt.text : '';
    return {
      index,
      text: echoed + events.map(({ delta }) => delta.text).join(''),
      logprobs:
        body.logprobs === undefined
          ? null
          : completionLogprobs(
              context.model,
              [
                ...(echo ? promptEntries(context, start) : []),
                ...events.flatMap(({ delta }) => delta.logprobs),
              ],
              body.logprobs,
              echo && start ? { token: start.prompt.tokens[0]! } : undefined,
              body.return_tokens_as_token_ids,
            ),
      finish_reason: events.at(-1)?.delta.finishReason ?? null,
      ...promptTokenIdsOf(body, events[0]),
      ...tokenIdsOf(body, events),
    };
  };
  return {
    chunks(event) {
      const { text, finishReason } = event.delta;
      const aboutPrompt = (echo || body.return_token_ids) && event.start !== undefined;
      if (text === '' && finishReason === undefined && !aboutPrompt) return [];
      return [{ ...base, choices: [choiceOf(event.index, [event])], ...withUsage }];
    },
    usageChunk: (usage) => ({ ...base, choices: [], usage }),
    whole: (events, usage) => ({
      ...base,
      choices: events.map((list, index) => choiceOf(index, list)),
      usage,
    }),
  };
}

/** Log-probabilities of an echoed prompt from its second token on, each at where its text begins. */
function promptEntries(context: ServerContext, start: ChoiceEvent['start']): ChoiceLogprob[] {
  if (!start?.promptLogprobs) return [];
  const decoder = context.model.decoder();
  let offset = decoder.push(start.prompt.tokens[0]!).length;
  return start.promptLogprobs.map((logprob) => {
    const entry = { logprob, offset };
    offset += decoder.push(logprob.token).length;
    return entry;
  });
}
