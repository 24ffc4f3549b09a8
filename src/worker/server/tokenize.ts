/** POST /tokenize and /detokenize, in vLLM's shapes. */
import type { FastifyReply, FastifyRequest } from 'fastify';
import { readRequest, type ServerContext } from './context.ts';

export async function postTokens(
  context: ServerContext,
  route: 'tokenize' | 'detokenize',
  request: FastifyRequest,
  reply: FastifyReply,
): Promise<Buffer> {
  const { buffer, byteOffset, byteLength } = await readRequest(context, route, request);
  reply.type('application/json; charset=utf-8');
  return Buffer.from(buffer, byteOffset, byteLength);
}
