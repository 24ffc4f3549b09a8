/** POST /v1/chat/completions. */
import type { FastifyReply, FastifyRequest } from 'fastify';
import { readRequest, type ServerContext } from './context.ts';
import { type ChoiceEvent, GenerationRun, prefillOf, promptTokenIdsOf, tokenIdsOf } from './generation.ts';
import { chatLogprobs } from './logprobs.ts';
import type { Readings } from './reading.ts';
import { requestIdOf } from './request-id.ts';
import { type AnswerFormat, goneSignal, respond } from './respond.ts';

export async function postChatCompletions(
  context: ServerContext,
  request: FastifyRequest,
  reply: FastifyReply,
): Promise<string | undefined> {
  const id = `chatcmpl-${requestIdOf(request, reply)}`;
  const leave = context.inFlight.enter(id);
  try {
    const gone = goneSignal(context, reply, id);
    const { body, model, asked } = await readRequest(context, 'chat', request, gone);
    const prompts = asked.prompts.map((prompt) => ({ ...prompt, serverId: id }));
    const plan = { ...asked, prompts, ...prefillOf(context, request) };
    return await respond(context, reply, new GenerationRun(context, plan), format(context, body, id, model), {
      gone,
      stream: body.stream ?? false,
      includeUsage: body.stream_options?.include_usage ?? false,
      choices: plan.n,
      id,
    });
  } finally {
    leave();
  }
}

function format(
  context: ServerContext,
  body: Readings['chat']['body'],
  id: string,
  model: string,
): AnswerFormat {
  const created = Math.floor(Date.now() / 1_000);
  const whole = { id, object: 'chat.completion', created, model };
  const chunk = { ...whole, object: 'chat.completion.chunk' };
  const withUsage = body.stream_options?.include_usage === true ? { usage: null } : {};
  const logprobsOf = async (events: readonly ChoiceEvent[]) =>
    body.logprobs
      ? await chatLogprobs(
          context.model,
          events.flatMap(({ delta }) => delta.logprobs),
          body.top_logprobs ?? 0,
          body.return_tokens_as_token_ids,
        )
      : null;
  const chunkOf = (choice: object, aboutPrompt: object = {}) => ({
    ...chunk,
    ...aboutPrompt,
    choices: [choice],
    ...withUsage,
  });
  return {
    async chunks(event) {
      const { index, start } = event;
      const { text, finishReason } = event.delta;
      const opening = {
        index,
        delta: { role: 'assistant', content: '' },
        logprobs: null,
        finish_reason: null,
      };
      const role = start ? [chunkOf(opening, promptTokenIdsOf(body, event))] : [];
      if (text === '' && finishReason === undefined) return role;
      const choice = {
        index,
        delta: text === '' ? {} : { content: text },
        logprobs: await logprobsOf([event]),
        finish_reason: finishReason ?? null,
        ...tokenIdsOf(body, [event]),
      };
      return [...role, chunkOf(choice)];
    },
    usageChunk: (usage) => ({ ...chunk, choices: [], usage }),
    async whole(events, usage) {
      const choices: object[] = [];
      for (const [index, list] of events.entries()) {
        choices.push({
          index,
          message: { role: 'assistant', content: list.map(({ delta }) => delta.text).join('') },
          logprobs: await logprobsOf(list),
          finish_reason: list.at(-1)?.delta.finishReason ?? null,
          ...tokenIdsOf(body, list),
        });
      }
      return { ...whole, ...promptTokenIdsOf(body, events[0]?.[0]), choices, usage };
    },
  };
}
