/** POST /v1/completions, /v1/chat/completions and /v1/responses: one flow from the body to the answer, whole as JSON or as server-sent events. */
import { once } from 'node:events';
import type { FastifyReply, FastifyRequest } from 'fastify';
import { PdError } from '../../errors.ts';
import type { TextModel } from '../../model/tokenizer.ts';
import { onClientGone } from '../../net/client-gone.ts';
import { eventText, type StreamEvent } from '../../openai-error.ts';
import {
  KV_FAILED_HEADER,
  PREFILL_WITHIN_HEADER,
  readPrefillWithin,
  readWire,
  WIRE_HEADER,
  type Wire,
  writeKvFailed,
} from '../../wire/overlap.ts';
import type { Readings } from '../request-body-reader.ts';
import type { AnswerBase, AnswerFormat } from './answers.ts';
import type { ChoiceEvent } from './choice.ts';
import { readRequest, type ServerContext } from './context.ts';
import { GenerationRun } from './generation.ts';
import { type GenerationRoute, promptIdsOf, requestIdOf, serverIdOf } from './in-flight.ts';
import { jsonInTurns } from './turns.ts';

/** A client that takes nothing for this long is gone. */
export const STALL_MS = 60_000;

interface Answering {
  readonly context: ServerContext;
  readonly reply: FastifyReply;
  readonly run: GenerationRun;
  readonly format: AnswerFormat;
  readonly id: string;
  /** Fires where the client goes away before it has its whole answer. */
  readonly gone: AbortSignal;
}

/** `formatOf`: how this API writes the answer to a body. What fails before the first byte is thrown; later it is an event of the stream. */
export async function postGeneration<R extends GenerationRoute>(
  context: ServerContext,
  route: R,
  formatOf: (model: TextModel, reading: Readings[R], base: AnswerBase) => AnswerFormat,
  request: FastifyRequest,
  reply: FastifyReply,
): Promise<string | undefined> {
  const { inFlight, traces } = context;
  const id = serverIdOf(route, requestIdOf(request, reply));
  const leave = inFlight.enter(id);
  const trace = traces?.begin(request.headers);
  let serverIds: readonly string[] = [];
  let asModel: string | undefined;
  let failure: PdError | undefined;
  try {
    const gone = goneSignal(context, reply, id);
    const reading = await readRequest(context, route, request, gone);
    inFlight.timelines.stamp(id, 'parsed');
    const { asked, body, model } = reading;
    asModel = model;
    serverIds = promptIdsOf(route, id, asked.prompts.length);
    const prefillWithinMs = prefillWithin(context, request);
    const wire = wireOf(context, request);
    const plan = {
      ...asked,
      id,
      serverIds,
      ...(prefillWithinMs !== undefined && { prefillWithinMs }),
      ...(wire && { wire }),
    };
    const run = new GenerationRun(context, plan);
    const fingerprint = `fp_${context.core.info.fingerprint.digest.slice(0, 12)}`;
    const base = { id, created: Math.floor(Date.now() / 1_000), model, fingerprint };
    const answering = { context, reply, run, format: formatOf(context.model, reading, base), id, gone };
    try {
      if (body.stream) return await answerStream(answering);
      return await answerWhole(answering, asked.prompts.length * asked.n);
    } finally {
      const { prompt_tokens, completion_tokens } = run.usage;
      inFlight.timelines.note(id, { prompt_tokens, completion_tokens });
    }
  } catch (error) {
    failure = PdError.from(error);
    throw error;
  } finally {
    leave();
    const timeline = trace && inFlight.timelines.get(id);
    if (timeline) {
      const transferIds = serverIds.map((one) => inFlight.transferIdOf(one));
      traces?.ended({ trace, route, timeline, transferIds, model: asModel, failure });
    }
  }
}

function goneSignal({ log }: ServerContext, reply: FastifyReply, id: string): AbortSignal {
  const gone = new AbortController();
  onClientGone(reply.raw, () => {
    log.debug({ requestId: id }, 'client went away: request aborted');
    gone.abort();
  });
  return gone.signal;
}

/** What the proxy says of a prefill that goes on. Only a consumer waits for one. */
function prefillWithin({ config }: ServerContext, { headers }: FastifyRequest): number | undefined {
  return config.role === 'consumer' ? readPrefillWithin(headers[PREFILL_WITHIN_HEADER]) : undefined;
}

/** What the proxy says; if it says nothing, `--wire native` decides; `--wire frozen` always does. */
function wireOf({ config }: ServerContext, { headers }: FastifyRequest): Wire | undefined {
  const said = config.wire === 'frozen' ? 'frozen' : readWire(headers[WIRE_HEADER]);
  return said ?? (config.wire === 'native' ? 'native' : undefined);
}

async function answerWhole(
  { context, reply, run, format, id, gone }: Answering,
  count: number,
): Promise<string> {
  const byChoice: ChoiceEvent[][] = Array.from({ length: count }, () => []);
  for await (const event of run.events(gone)) byChoice[event.index]!.push(event);
  if (run.kvFailure) reply.header(KV_FAILED_HEADER, writeKvFailed(run.kvFailure));
  reply.type('application/json; charset=utf-8');
  const text = await jsonInTurns(await format.whole(byChoice, run.usage));
  context.inFlight.timelines.stamp(id, 'written');
  return text;
}

async function answerStream({ context, reply, run, format, id, gone }: Answering): Promise<undefined> {
  const events = run.events(gone);
  // Headers wait for the first event, so that a request that fails outright has its own HTTP status.
  let next = await events.next();
  reply.hijack();
  const { raw } = reply;
  const write = async (text: string): Promise<void> => {
    if (gone.aborted || raw.write(text)) return;
    const stalled = AbortSignal.timeout(STALL_MS);
    await once(raw, 'drain', { signal: AbortSignal.any([gone, stalled]) }).catch(() => {
      if (stalled.aborted) raw.destroy();
    });
  };
  const send = async (all: readonly StreamEvent[]): Promise<void> => {
    for (const { name, data, long } of all) {
      await write(eventText(long ? await jsonInTurns(data) : JSON.stringify(data), name));
    }
  };
  raw.writeHead(200, {
    ...(reply.getHeaders() as Record<string, string>),
    'content-type': 'text/event-stream; charset=utf-8',
    'cache-control': 'no-cache',
    'x-accel-buffering': 'no',
  });
  try {
    await send(format.begin());
    for (let first = true; !next.done; first = false, next = await events.next()) {
      await send(await format.said(next.value));
      if (first) context.inFlight.timelines.stamp(id, 'written');
    }
    await send(format.end(run.usage));
  } catch (cause) {
    const error = PdError.from(cause);
    if (!gone.aborted) {
      context.inFlight.timelines.note(id, { error: error.code });
      context.log.warn({ requestId: id, code: error.code }, `stream ended early: ${error.message}`);
      await send(format.broke(error));
    }
  } finally {
    await events.return(undefined);
    if (format.last !== undefined) await write(`data: ${format.last}\n\n`);
    raw.end();
  }
}
