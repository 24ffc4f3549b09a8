/**
 * What our proxy says of a request's KV, beside the request itself.
 *
 *   POST /kv/release    it will not be decoded by this pair (its client went away, the consumer refused it or could not be reached): what
 *                       either end holds of it can go now instead of at the orphan deadline
 *   POST /kv/prefilled  the producer has answered, the consumer not yet: from now on it waits for KV that is on its way, no longer
 */
import type { FastifyRequest } from 'fastify';
import { z } from 'zod';
import { type TransferId, transferIdOf } from '../../wire/ids.ts';
import { bodyOf, type ServerContext } from './context.ts';
import { parseJson } from './reading.ts';
import { MAX_PROMPTS, parseBody } from './schemas.ts';

/** Bytes; the longest notice has an id of 512 characters. */
export const NOTICE_LIMIT = 4_096;

const noticeSchema = z.object({
  /** As sent in X-Request-Id. */
  request_id: z.string().regex(/^[\x21-\x7e]{1,512}$/, 'expected 1 to 512 printable ASCII characters'),
  route: z.enum(['/v1/completions', '/v1/chat/completions']),
  prompts: z.int().min(1).max(MAX_PROMPTS),
});

export function postRelease(context: ServerContext, request: FastifyRequest): object {
  const { requestId, transferIds } = meantBy(request);
  context.log.debug({ requestId, prompts: transferIds.length }, 'KV of a request released');
  context.core.release(transferIds);
  return { released: transferIds.length };
}

export function postPrefilled(context: ServerContext, request: FastifyRequest): object {
  const { requestId, transferIds } = meantBy(request);
  context.log.debug({ requestId, prompts: transferIds.length }, 'prompt of a request computed');
  context.core.prefilled(transferIds);
  return { prefilled: transferIds.length };
}

function meantBy(request: FastifyRequest): {
  readonly requestId: string;
  readonly transferIds: readonly TransferId[];
} {
  const { request_id, route, prompts } = parseBody(noticeSchema, parseJson(bodyOf(request)));
  const serverIds =
    route === '/v1/completions'
      ? Array.from({ length: prompts }, (_, index) => `cmpl-${request_id}-${index}`)
      : [`chatcmpl-${request_id}`];
  return { requestId: request_id, transferIds: serverIds.map(transferIdOf) };
}
