import type { FastifyReply } from 'fastify';

/**
 * Before the answer to a body that is too long, which Fastify would have end the connection. Most clients send all of a body before they read:
 * of one that has been closed upon them they see no answer, a proxy takes the server for broken. So the rest is read and forgotten, for as long
 * as a request may take (`requestTimeout`), and the connection serves the next one.
 */
export function keepReading(reply: FastifyReply): void {
  reply.removeHeader('connection');
}
