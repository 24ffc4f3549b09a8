/**
 * POST /kv/release, from our proxy: a request whose prompt was computed will not be decoded by this pair (its client went away, the
 * consumer refused it or could not be reached), so what either end holds of its KV can go now instead of at the orphan deadline.
 */
import type { FastifyRequest } from 'fastify';
import { z } from 'zod';
import { transferIdOf } from '../../wire/ids.ts';
import type { ServerContext } from './context.ts';
import { MAX_PROMPTS, parseBody } from './schemas.ts';

const releaseSchema = z.object({
  /** As sent in X-Request-Id. */
  request_id: z.string().regex(/^[\x21-\x7e]{1,512}$/, 'expected 1 to 512 printable ASCII characters'),
  route: z.enum(['/v1/completions', '/v1/chat/completions']),
  prompts: z.int().min(1).max(MAX_PROMPTS),
});

export function postRelease(context: ServerContext, request: FastifyRequest): object {
  const { request_id, route, prompts } = parseBody(releaseSchema, request.body);
  const serverIds =
    route === '/v1/completions'
      ? Array.from({ length: prompts }, (_, index) => `cmpl-${request_id}-${index}`)
      : [`chatcmpl-${request_id}`];
  context.log.debug({ requestId: request_id, prompts }, 'KV of a request released');
  context.core.release(serverIds.map(transferIdOf));
  return { released: serverIds.length };
}
