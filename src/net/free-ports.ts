/** Ports for programs that are told their port and keep it, also when they are started again. */
import { randomInt } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createServer, type Server } from 'node:net';
import { PdError } from '../errors.ts';

const LOWEST = 15_000;
/** Where the system's own range begins unless it says otherwise: of Linux; others begin higher. */
const USUAL_EPHEMERAL = 32_768;
/** Below this many there is no choice worth the name, and any port must do. */
const ENOUGH = 1_000;

/**
 * `count` different ports, all free a moment ago. They lie below the range from which the system serves `listen(0)` and outgoing
 * connections, so that nobody is given one by chance before its program binds it. Throws PORT_IN_USE where there are not so many, and
 * the system's error where `host` cannot be bound at all.
 */
export async function freePorts(count: number, host: string): Promise<number[]> {
  const end = firstEphemeralPort();
  const width = end - LOWEST;
  // All are held at once before any is given back, so that they differ.
  const held: Server[] = [];
  try {
    let at = width < ENOUGH ? 0 : randomInt(width);
    for (let tried = 0; held.length < count; tried++, at++) {
      if (tried > Math.max(width, count)) {
        throw new PdError('PORT_IN_USE', `${count} free ports on ${host} could not be found`);
      }
      const server = await listening(host, width < ENOUGH ? 0 : LOWEST + (at % width));
      if (server) held.push(server);
    }
    return held.map(portOf);
  } finally {
    await Promise.all(held.map((server) => new Promise((resolve) => server.close(resolve))));
  }
}

/** Undefined where somebody has the port. */
function listening(host: string, port: number): Promise<Server | undefined> {
  const server = createServer();
  return new Promise((resolve, reject) => {
    server.once('error', (error: NodeJS.ErrnoException) => {
      if (error.code === 'EADDRINUSE') resolve(undefined);
      else reject(error);
    });
    server.listen({ host, port }, () => resolve(server));
  });
}

function portOf(server: Server): number {
  const address = server.address();
  return typeof address === 'object' && address !== null ? address.port : 0;
}

function firstEphemeralPort(): number {
  try {
    return Number.parseInt(readFileSync('/proc/sys/net/ipv4/ip_local_port_range', 'utf8'), 10);
  } catch {
    return USUAL_EPHEMERAL;
  }
}
