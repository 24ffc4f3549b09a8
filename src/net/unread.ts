import type { ServerResponse } from 'node:http';
import type { FastifyInstance } from 'fastify';

/**
 * Ends a connection whose client has taken nothing for so long of an answer that is whole, but still in memory here: nobody else waits for
 * it any more.
 */
export function limitUnread(app: FastifyInstance, ms: number): void {
  app.server.on('request', (_request, out: ServerResponse) => {
    // Handed to the connection, which may be later than its end: others may be before it. Once it has been taken Node sets its own time.
    out.once('prefinish', () => {
      if (out.socket && out.socket.writableLength > 0) out.socket.setTimeout(ms);
    });
  });
}
