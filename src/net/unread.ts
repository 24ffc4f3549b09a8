import type { ServerResponse } from 'node:http';
import type { FastifyInstance } from 'fastify';

/**
 * Ends a connection whose client has taken nothing for so long of an answer that is whole, but still in memory here: nobody else waits for
 * it any more.
 */
export function limitUnread(app: FastifyInstance, ms: number): void {
  app.server.on('request', (_request, out: ServerResponse) => {
    // Handed to the connection, which may be later than its end: others may be before it.
    out.once('prefinish', () => {
      const { socket } = out;
      if (!socket || socket.writableLength === 0) return;
      socket.setTimeout(ms);
      // Taken. Node sets a time of its own behind this, unless another answer is next, which may take long.
      out.prependOnceListener('finish', () => socket.setTimeout(0));
    });
  });
}
