import { connect } from 'node:net';
import { asDestination, type HostPort } from './address.ts';
import { addressesOf, EVERY_ADDRESS } from './resolve.ts';

/** What a TCP port does with a connection: accepts it, refuses it, or nothing at all within the time given. */
export type PortAnswer = 'answers' | 'refuses' | 'silent';

/**
 * `refuses`: nothing listens at `address`. `silent` may be a firewall, or a host that is down. Never rejects: an impossible address (port
 * 70000) counts as `refuses`.
 */
export function knock(address: HostPort, timeoutMs: number): Promise<PortAnswer> {
  return new Promise<PortAnswer>((resolve) => {
    const socket = connect({ ...asDestination(address), ...EVERY_ADDRESS, timeout: timeoutMs });
    const end = (answer: PortAnswer) => {
      socket.destroy();
      resolve(answer);
    };
    socket.once('connect', () => end('answers'));
    socket.once('timeout', () => end('silent'));
    socket.once('error', ({ code }: NodeJS.ErrnoException) =>
      end(code === 'ECONNREFUSED' ? 'refuses' : 'silent'),
    );
  }).catch(() => 'refuses');
}

/** The first address of a name that accepts a connection, or its first address if none does. Rejects if it has none. */
export async function reachable({ host, port }: HostPort, timeoutMs: number): Promise<HostPort> {
  const all = (await addressesOf(host)).map(({ address }) => ({ host: address, port }));
  if (all.length > 1) {
    for (const one of all) if ((await knock(one, timeoutMs)) === 'answers') return one;
  }
  return all[0] ?? { host, port };
}
