/** The id that a request came with, or a random one; the answer names it in the same header. */
import { randomBytes } from 'node:crypto';
import type { FastifyReply, FastifyRequest } from 'fastify';
import { PdError } from '../../errors.ts';

const HEADER = 'x-request-id';
/** Printable and without blanks: it becomes part of log lines, ZeroMQ messages and tensor ids. */
const ALLOWED = /^[\x21-\x7e]{1,512}$/;

export function requestIdOf(request: FastifyRequest, reply: FastifyReply): string {
  const given = request.headers[HEADER];
  if (given !== undefined && (typeof given !== 'string' || !ALLOWED.test(given))) {
    throw new PdError('REQUEST_INVALID', 'X-Request-Id: expected 1 to 512 printable ASCII characters', {
      param: 'X-Request-Id',
    });
  }
  const id = given ?? randomBytes(16).toString('hex');
  reply.header(HEADER, id);
  return id;
}
