/** One HTTP answer from a run: whole as JSON, or as server-sent events while it comes. */
import { once } from 'node:events';
import type { FastifyReply } from 'fastify';
import { PdError } from '../../errors.ts';
import { openAiError } from '../../openai-error.ts';
import { KV_FAILED_HEADER, writeKvFailed } from '../../wire/overlap.ts';
import type { ServerContext } from './context.ts';
import type { ChoiceEvent, GenerationRun, Usage } from './generation.ts';
import { jsonInTurns } from './turns.ts';

/** A client that takes nothing for so long is gone. */
const STALL_MS = 60_000;

/** How one API writes its answers. */
export interface AnswerFormat {
  /** What a stream says of one event; several chunks where one is not enough. */
  chunks(event: ChoiceEvent): Promise<readonly object[]>;
  usageChunk(usage: Usage): object;
  /** The whole answer; `events` by choice, each list in order. */
  whole(events: readonly (readonly ChoiceEvent[])[], usage: Usage): Promise<object>;
}

export interface AnswerOptions {
  readonly stream: boolean;
  readonly includeUsage: boolean;
  readonly choices: number;
  /** Of the same request (`goneSignal`). */
  readonly gone: AbortSignal;
  /** For the log. */
  readonly id: string;
}

/** Fires where the client goes away before it has its whole answer. `id` is for the log. */
export function goneSignal({ log }: ServerContext, reply: FastifyReply, id: string): AbortSignal {
  const gone = new AbortController();
  const { raw } = reply;
  raw.once('close', () => {
    if (raw.writableFinished) return;
    log.debug({ requestId: id }, 'client went away: request aborted');
    gone.abort();
  });
  if (raw.destroyed) gone.abort(); // gone before anyone listened
  return gone.signal;
}

/** Answers from `run`. What fails before the first byte is thrown; later it is an event of the stream. */
export async function respond(
  context: ServerContext,
  reply: FastifyReply,
  run: GenerationRun,
  format: AnswerFormat,
  options: AnswerOptions,
): Promise<string | undefined> {
  const events = run.events(options.gone);
  if (options.stream) return await stream(context, reply, events, run, format, options);
  const byChoice: ChoiceEvent[][] = Array.from({ length: options.choices }, () => []);
  for await (const event of events) byChoice[event.index]!.push(event);
  if (run.kvFailure) reply.header(KV_FAILED_HEADER, writeKvFailed(run.kvFailure));
  reply.type('application/json; charset=utf-8');
  return await jsonInTurns(await format.whole(byChoice, run.usage));
}

async function stream(
  context: ServerContext,
  reply: FastifyReply,
  events: AsyncGenerator<ChoiceEvent>,
  run: GenerationRun,
  format: AnswerFormat,
  options: AnswerOptions,
): Promise<undefined> {
  const { gone } = options;
  // Headers wait for the first event, so that a request that fails outright has its own HTTP status.
  let next = await events.next();
  reply.hijack();
  const { raw } = reply;
  const send = async (data: string): Promise<void> => {
    if (gone.aborted || raw.write(`data: ${data}\n\n`)) return;
    const stalled = AbortSignal.timeout(STALL_MS);
    await once(raw, 'drain', { signal: AbortSignal.any([gone, stalled]) }).catch(() => {
      if (stalled.aborted) raw.destroy();
    });
  };
  raw.writeHead(200, {
    ...(reply.getHeaders() as Record<string, string>),
    'content-type': 'text/event-stream; charset=utf-8',
    'cache-control': 'no-cache',
    'x-accel-buffering': 'no',
  });
  try {
    for (; !next.done; next = await events.next()) {
      // What is said of a prompt may be long, what is said of a token is not.
      const write = next.value.start ? jsonInTurns : JSON.stringify;
      for (const chunk of await format.chunks(next.value)) await send(await write(chunk));
    }
    if (options.includeUsage) await send(JSON.stringify(format.usageChunk(run.usage)));
  } catch (cause) {
    const error = PdError.from(cause);
    if (!gone.aborted) {
      context.log.warn({ requestId: options.id, code: error.code }, `stream ended early: ${error.message}`);
      await send(JSON.stringify(openAiError(error)));
    }
  } finally {
    await events.return(undefined);
    await send('[DONE]');
    raw.end();
  }
}
