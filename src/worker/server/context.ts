/** What the routes share. */
import type { FastifyRequest } from 'fastify';
import type { Guard } from '../../access/guard.ts';
import type { WorkerConfig } from '../../config/worker-config.ts';
import type { TextModel } from '../../model/tokenizer.ts';
import type { AllowList } from '../../net/allow-list.ts';
import type { Logger, RateLimitedLog } from '../../observability/log.ts';
import type { MetricsPage } from '../../observability/metrics.ts';
import { dialectOf } from '../../parsing/calls.ts';
import { reasoningOf } from '../../parsing/reasoning.ts';
import { OUTPUT_TOKENS_HEADER, readOutputTokens } from '../../wire/overlap.ts';
import { PROMPT_IDS_HEADER, splitPromptIds } from '../../wire/prompt-ids.ts';
import type { CoreClient } from '../core-client.ts';
import type { Readings, RequestBodyReader, Route } from '../request-body-reader.ts';
import type { WorkerTraces } from '../request-trace.ts';
import type { Served } from './fields.ts';
import type { InFlight } from './in-flight.ts';

export interface ServerContext {
  readonly config: WorkerConfig;
  readonly core: Pick<CoreClient, 'generate' | 'info' | 'inspect' | 'state' | 'tell' | 'timelines'>;
  readonly reader: Pick<RequestBodyReader, 'read'>;
  /** For the text of what is generated. */
  readonly model: TextModel;
  readonly guard: Guard;
  readonly inFlight: InFlight;
  /** The main thread's own page. */
  readonly metrics: MetricsPage;
  /** Every thread's page, for /metrics. */
  readonly pages: readonly MetricsPage[];
  readonly version: string;
  /** Where traces are made. */
  readonly traces?: Pick<WorkerTraces, 'begin' | 'ended'> | undefined;
  readonly log: Logger;
  readonly limited: RateLimitedLog;
  /** Whose token ids of a prompt are taken for its text. Absent: nobody's. */
  readonly promptIdsFrom?: AllowList | undefined;
}

/** The routes whose bodies may be long read them by this. Throws what `BodyReader.read` throws. */
export async function readRequest<R extends Route>(
  context: ServerContext,
  route: R,
  request: FastifyRequest,
  signal?: AbortSignal,
): Promise<Readings[R]> {
  const { body, ids } = splitPromptIds(bodyOf(request), request.headers[PROMPT_IDS_HEADER]);
  const promptIds = ids && trusts(context, request) ? ids : undefined;
  const outputTokens = readOutputTokens(request.headers[OUTPUT_TOKENS_HEADER]);
  const served = {
    ...servedBy(context),
    ...(promptIds && { promptIds }),
    ...(outputTokens !== undefined && { outputTokens }),
  };
  return await context.reader.read(served, route, body, signal);
}

/** Whether the ids that a caller sends along with a prompt's text are taken for it: where callers show a key, this one has. */
function trusts({ guard, promptIdsFrom, limited, log }: ServerContext, { socket }: FastifyRequest): boolean {
  const address = socket.remoteAddress ?? '';
  if (guard.keyed || promptIdsFrom?.allows(address)) return true;
  limited.log('prompt ids', (suppressed) =>
    log.warn(
      { suppressed },
      `token ids of a prompt from ${address} are passed over: no key is asked for, and --prompt-ids-from does not list it`,
    ),
  );
  return false;
}

function servedBy({ config, core, model }: ServerContext): Served {
  const { maxModelLen, vocabSize } = core.info;
  const { servedModelNames: modelNames, toolCallParser, reasoningParser } = config;
  const template = model.chatTemplate ?? '';
  const calls = toolCallParser === 'auto' ? dialectOf(template) : toolCallParser;
  const reasoning = reasoningParser === 'auto' ? reasoningOf(template) : reasoningParser;
  return {
    modelNames,
    maxModelLen,
    vocabSize,
    ...(calls && calls !== 'none' && { calls }),
    ...(reasoning && reasoning !== 'none' && { reasoning }),
  };
}

/** A body as it came. Only JSON gets this far; a request without any body has none. */
export function bodyOf(request: FastifyRequest): Uint8Array<ArrayBuffer> {
  return request.body instanceof Uint8Array ? (request.body as Uint8Array<ArrayBuffer>) : new Uint8Array(0);
}
