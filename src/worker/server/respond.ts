/** One HTTP answer from a run: whole as JSON, or as server-sent events while it comes. */
import { once } from 'node:events';
import type { FastifyReply } from 'fastify';
import { PdError } from '../../errors.ts';
import { openAiError } from '../../openai-error.ts';
import { KV_FAILED_HEADER, writeKvFailed } from '../../wire/overlap.ts';
import type { ServerContext } from './context.ts';
import type { ChoiceEvent, GenerationRun, Usage } from './generation.ts';

/** A client that takes nothing for so long is gone. */
const STALL_MS = 60_000;

/** How one API writes its answers. */
export interface AnswerFormat {
  /** What a stream says of one event; several chunks where one is not enough. */
  chunks(event: ChoiceEvent): readonly object[];
  usageChunk(usage: Usage): object;
  /** The whole answer; `events` by choice, each list in order. */
  whole(events: readonly (readonly ChoiceEvent[])[], usage: Usage): object;
}

export interface AnswerOptions {
  readonly stream: boolean;
  readonly includeUsage: boolean;
  readonly choices: number;
  /** For the log. */
  readonly id: string;
}

/** Answers from `run`. What fails before the first byte is thrown; later it is an event of the stream. */
export async function respond(
  context: ServerContext,
  reply: FastifyReply,
  run: GenerationRun,
  format: AnswerFormat,
  options: AnswerOptions,
): Promise<object | undefined> {
  const gone = new AbortController();
  const onClose = () => {
    if (reply.raw.writableFinished) return;
    context.log.debug({ requestId: options.id }, 'client went away: request aborted');
    gone.abort();
  };
  reply.raw.once('close', onClose);
  if (reply.raw.destroyed) gone.abort(); // gone before anyone listened
  try {
    const events = run.events(gone.signal);
    if (options.stream) return await stream(context, reply, events, run, format, options, gone.signal);
    const byChoice: ChoiceEvent[][] = Array.from({ length: options.choices }, () => []);
    for await (const event of events) byChoice[event.index]!.push(event);
    if (run.kvFailure) reply.header(KV_FAILED_HEADER, writeKvFailed(run.kvFailure));
    return format.whole(byChoice, run.usage);
  } finally {
    reply.raw.off('close', onClose);
  }
}

async function stream(
  context: ServerContext,
  reply: FastifyReply,
  events: AsyncGenerator<ChoiceEvent>,
  run: GenerationRun,
  format: AnswerFormat,
  options: AnswerOptions,
  gone: AbortSignal,
): Promise<undefined> {
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
      for (const chunk of format.chunks(next.value)) await send(JSON.stringify(chunk));
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
