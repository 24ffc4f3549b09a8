/** Whether a client is still there to be answered. */
import type { ServerResponse } from 'node:http';

/**
 * Calls `onGone` where the connection ends before the answer has left. Of requests that came one behind the other on a connection, without
 * waiting for answers, Node tells only the one whose turn it is that the client has gone: so it is the connection that is listened to.
 */
export function onClientGone(out: ServerResponse, onGone: () => void): void {
  const { socket } = out.req;
  if (socket.destroyed) {
    onGone(); // before anyone listened
    return;
  }
  const closed = () => {
    if (!out.writableFinished) onGone();
  };
  socket.setMaxListeners(0); // there may be many behind each other
  socket.once('close', closed);
  out.once('close', () => socket.off('close', closed));
}
