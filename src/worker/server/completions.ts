/** POST /v1/completions. */
import type { FastifyReply, FastifyRequest } from 'fastify';
import { unpackLogprobs } from '../../scheduler/prompt-logprobs.ts';
import type { ChoiceLogprob } from './choice.ts';
import { readRequest, type ServerContext } from './context.ts';
import { type ChoiceEvent, GenerationRun, prefillOf, promptTokenIdsOf, tokenIdsOf } from './generation.ts';
import { completionLogprobs } from './logprobs.ts';
import type { Readings } from './reading.ts';
import { requestIdOf } from './request-id.ts';
import { type AnswerFormat, goneSignal, respond } from './respond.ts';
import { turns } from './turns.ts';

export async function postCompletions(
  context: ServerContext,
  request: FastifyRequest,
  reply: FastifyReply,
): Promise<string | undefined> {
  const id = `cmpl-${requestIdOf(request, reply)}`;
  const leave = context.inFlight.enter(id);
  try {
    const gone = goneSignal(context, reply, id);
    const { body, model, asked } = await readRequest(context, 'completions', request, gone);
    const prompts = asked.prompts.map((prompt, index) => ({ ...prompt, serverId: `${id}-${index}` }));
    const plan = { ...asked, prompts, ...prefillOf(context, request) };
    return await respond(context, reply, new GenerationRun(context, plan), format(context, body, id, model), {
      gone,
      stream: body.stream ?? false,
      includeUsage: body.stream_options?.include_usage ?? false,
      choices: plan.prompts.length * plan.n,
      id,
    });
  } finally {
    leave();
  }
}

function format(
  context: ServerContext,
  body: Readings['completions']['body'],
  id: string,
  model: string,
): AnswerFormat {
  const base = { id, object: 'text_completion', created: Math.floor(Date.now() / 1_000), model };
  const withUsage = body.stream_options?.include_usage === true ? { usage: null } : {};
  const echo = body.echo ?? false;

  const choiceOf = async (index: number, events: readonly ChoiceEvent[]) => {
    const start = events[0]?.start;
    const echoed = echo && start ? start.prompt.text : '';
    return {
      index,
      text: echoed + events.map(({ delta }) => delta.text).join(''),
      logprobs:
        body.logprobs === undefined
          ? null
          : await completionLogprobs(
              context.model,
              entriesOf(context, echo ? start : undefined, events),
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
    async chunks(event) {
      const { text, finishReason } = event.delta;
      const aboutPrompt = (echo || body.return_token_ids) && event.start !== undefined;
      if (text === '' && finishReason === undefined && !aboutPrompt) return [];
      return [{ ...base, choices: [await choiceOf(event.index, [event])], ...withUsage }];
    },
    usageChunk: (usage) => ({ ...base, choices: [], usage }),
    async whole(events, usage) {
      const choices: object[] = [];
      const turn = turns();
      for (const [index, list] of events.entries()) {
        choices.push(await choiceOf(index, list));
        await turn();
      }
      return { ...base, choices, usage };
    },
  };
}

/** Log-probabilities of a choice, before them those of an echoed prompt from its second token on, each at where its text begins. */
function* entriesOf(
  context: ServerContext,
  echoed: ChoiceEvent['start'],
  events: readonly ChoiceEvent[],
): Generator<ChoiceLogprob> {
  if (echoed?.promptLogprobs) {
    const decoder = context.model.decoder();
    let offset = decoder.push(echoed.prompt.tokens[0]!).length;
    for (const logprob of unpackLogprobs(echoed.promptLogprobs)) {
      yield { logprob, offset };
      offset += decoder.push(logprob.token).length;
    }
  }
  for (const { delta } of events) yield* delta.logprobs;
}
