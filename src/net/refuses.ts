import { connect } from 'node:net';
import { asDestination, type HostPort } from './address.ts';

/**
 * Whether nothing listens at `address`: its host refuses the connection. False where somebody listens, and where nobody answers at all
 * within `timeoutMs`, which may be a silent firewall. Never rejects: at what is no address at all (port 70000) nothing listens either.
 */
export function refusesConnections(address: HostPort, timeoutMs: number): Promise<boolean> {
  return new Promise<boolean>((resolve) => {
    const socket = connect({ ...asDestination(address), timeout: timeoutMs });
    const end = (refused: boolean) => {
      socket.destroy();
      resolve(refused);
    };
    socket.once('connect', () => end(false));
    socket.once('timeout', () => end(false));
    socket.once('error', (error: NodeJS.ErrnoException) => end(error.code === 'ECONNREFUSED'));
  }).catch(() => true);
}
