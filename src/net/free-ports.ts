/** Ports for programs that are given a port and keep it across restarts. */
import { randomInt } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { type AddressInfo, createServer, type Server } from 'node:net';
import { PdError } from '../errors.ts';

const LOWEST = 15_000;
/** Where the ephemeral range of Linux begins by default; on other systems it begins higher. */
const USUAL_EPHEMERAL = 32_768;
/** With fewer than this many to choose from, any port must do. */
const ENOUGH = 1_000;

/**
 * `count` different ports, all free a moment ago. They lie below the ephemeral range, from which the system serves `listen(0)` and
 * outgoing connections, so that none is handed out by chance before its program binds it. Throws PORT_IN_USE if there are not enough,
 * and the system's error if `host` cannot be bound at all.
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
        throw new PdError('PORT_IN_USE', `could not find ${count} free ports on ${host}`);
      }
      const server = await listening(host, width < ENOUGH ? 0 : LOWEST + (at % width));
      if (server) held.push(server);
    }
    return held.map((server) => (server.address() as AddressInfo).port);
  } finally {
    await Promise.all(held.map((server) => new Promise((resolve) => server.close(resolve))));
  }
}

/** Undefined if the port is in use. */
async function listening(host: string, port: number): Promise<Server | undefined> {
  const server = createServer().listen({ host, port });
  try {
    await once(server, 'listening');
    return server;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EADDRINUSE') return undefined;
    throw error;
  }
}

function firstEphemeralPort(): number {
  try {
    return Number.parseInt(readFileSync('/proc/sys/net/ipv4/ip_local_port_range', 'utf8'), 10);
  } catch {
    return USUAL_EPHEMERAL;
  }
}
