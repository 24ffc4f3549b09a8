/**
 * Notices: what pd-proxy tells a worker about a request's KV, apart from the request itself (src/proxy/notices.ts sends them).
 *
 *   POST /kv/release    this pair will not decode it (its client went away, the consumer refused it or could not be reached): whatever
 *                       this worker holds of it can be freed now rather than at the orphan deadline
 *   POST /kv/prefilled  the producer has answered, the consumer not yet: from now on it waits only for KV that is on its way
 *   POST /kv/failed     the producer has answered that it could not send the KV: the consumer computes the prompt, or fails, at once
 *
 * And what it asks:
 *
 *   POST /kv/receipt    when the request passed which stage here, and what came or went of its KV
 */
import type { FastifyRequest } from 'fastify';
import type { Timeline } from '../../observability/timelines.ts';
import type { TransferId } from '../../wire/ids.ts';
import { readErrorData } from '../../wire/overlap.ts';
import { z } from '../../zod.ts';
import { bodyOf, type ServerContext } from './context.ts';
import { MAX_PROMPTS, parseBody, parseJson } from './fields.ts';
import { GENERATION_ROUTES, promptIdsOf, requestIdSchema, serverIdOf } from './in-flight.ts';
import type { GenerationPath } from './openapi.ts';

/** Bytes; the longest notice carries an error with its causes. */
export const NOTICE_LIMIT = 32_768;

const noticeSchema = z.object({
  /** As sent in X-Request-Id. */
  request_id: requestIdSchema,
  route: z.enum(Object.keys(GENERATION_ROUTES) as GenerationPath[]),
  prompts: z.int().min(1).max(MAX_PROMPTS),
});

const failedSchema = noticeSchema.extend({
  error: z.unknown().transform((value, check) => {
    const error = readErrorData(value);
    if (error) return error;
    check.addIssue('expected code, message and context');
    return z.NEVER;
  }),
});

export function postFailed(context: ServerContext, request: FastifyRequest): object {
  const { error, requestId, transferIds } = readNotice(failedSchema, context, request);
  context.log.debug(
    { requestId, code: error.code },
    `the producer could not send KV of a request: ${error.message}`,
  );
  const reason = { ...error, message: `the producer could not send it: ${error.message}` };
  context.core.tell({ type: 'kv-failed', transferIds, reason });
  return { failed: transferIds.length };
}

export function postRelease(context: ServerContext, request: FastifyRequest): object {
  const { requestId, transferIds } = readNotice(noticeSchema, context, request);
  context.log.debug({ requestId, prompts: transferIds.length }, 'KV of a request released');
  context.core.tell({ type: 'release', transferIds });
  return { released: transferIds.length };
}

export function postPrefilled(context: ServerContext, request: FastifyRequest): object {
  const { requestId, transferIds } = readNotice(noticeSchema, context, request);
  context.log.debug({ requestId, prompts: transferIds.length }, 'prompt of a request computed');
  context.core.tell({ type: 'prefilled', transferIds });
  return { prefilled: transferIds.length };
}

/**
 * In both, `at_ms` counts from the arrival of the request here: `server`, of the main thread, for the whole request, with its tokens;
 * `prompts`, of the core thread, for each prompt, with what is known of its KV. Null, and left out: what is not known any more.
 */
export async function postReceipt(context: ServerContext, request: FastifyRequest): Promise<object> {
  const { serverId, transferIds } = readNotice(noticeSchema, context, request);
  const { core, inFlight, config } = context;
  const own = inFlight.timelines.get(serverId);
  const from = own?.stages[0]?.at;
  const prompts = from === undefined ? [] : await core.timelines(transferIds);
  return {
    role: config.role,
    server: own && from !== undefined ? receiptOf(own, from) : null,
    prompts: prompts.map((timeline) => receiptOf(timeline, from!)),
  };
}

function receiptOf({ stages, facts }: Timeline, from: number): object {
  return {
    stages: stages.map(({ stage, at, tokens }) => ({
      stage,
      at_ms: Math.round((at - from) * 1_000) / 1_000,
      ...(tokens !== undefined && { tokens }),
    })),
    ...facts,
  };
}

/** With the id of each prompt's KV. */
function readNotice<N extends z.infer<typeof noticeSchema>>(
  schema: z.ZodType<N>,
  { inFlight }: ServerContext,
  request: FastifyRequest,
): N & {
  readonly requestId: string;
  readonly serverId: string;
  readonly transferIds: readonly TransferId[];
} {
  const notice = parseBody(schema, parseJson(bodyOf(request)));
  const { request_id: requestId, route, prompts } = notice;
  const kind = GENERATION_ROUTES[route];
  const serverId = serverIdOf(kind, requestId);
  const serverIds = promptIdsOf(kind, serverId, prompts);
  return { ...notice, requestId, serverId, transferIds: serverIds.map((id) => inFlight.transferIdOf(id)) };
}
