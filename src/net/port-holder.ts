/** Which process holds a TCP port that we need, as far as /proc shows it. */

import { once } from 'node:events';
import { readdir, readFile, readlink } from 'node:fs/promises';
import { type AddressInfo, connect, createServer } from 'node:net';
import { withDeadline } from '../deferred.ts';
import { PdError } from '../errors.ts';
import { asDestination, formatHostPort, type HostPort, isLoopback, isUnspecified } from './address.ts';

const LISTEN = '0A';
const REACH_TIMEOUT_MS = 2_000;

/** `node (pid 4711)`, or undefined if it cannot be known (no /proc, another user's process). */
async function portHolder(port: number): Promise<string | undefined> {
  const inodes = new Set<string>();
  for (const table of ['/proc/net/tcp', '/proc/net/tcp6']) {
    const text = await readFile(table, 'utf8').catch(() => '');
    for (const inode of listeningInodes(text, port)) inodes.add(inode);
  }
  if (inodes.size === 0) return undefined;
  for (const pid of (await readdir('/proc').catch(() => [])).filter((name) => /^\d+$/.test(name))) {
    for (const fd of await readdir(`/proc/${pid}/fd`).catch(() => [])) {
      const target = await readlink(`/proc/${pid}/fd/${fd}`).catch(() => '');
      const inode = /^socket:\[(\d+)\]$/.exec(target)?.[1];
      if (inode === undefined || !inodes.has(inode)) continue;
      const name = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => 'process');
      return `${name.trim()} (pid ${pid})`;
    }
  }
  return undefined;
}

/** Inodes of the sockets that listen on `port`; `table` as /proc/net/tcp has it. */
export function listeningInodes(table: string, port: number): string[] {
  const inodes: string[] = [];
  for (const line of table.split('\n').slice(1)) {
    // sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode
    const [, local, , state, , , , , , inode] = line.trim().split(/\s+/);
    if (state !== LISTEN || local === undefined || inode === undefined) continue;
    if (Number.parseInt(local.split(':')[1] ?? '', 16) === port) inodes.push(inode);
  }
  return inodes;
}

/** PORT_IN_USE or ADDRESS_INVALID for a failed listen, naming `what`, the port and the process that holds it. */
export async function listenError(error: unknown, address: HostPort, what: string): Promise<PdError> {
  const code = (error as NodeJS.ErrnoException).code;
  const where = formatHostPort(address);
  if (code === 'EADDRINUSE') {
    const by = (await portHolder(address.port)) ?? 'another process';
    // It may be held on one address only.
    const on = isUnspecified(address.host) ? '' : ` on ${address.host}`;
    return new PdError('PORT_IN_USE', `${what}: port ${address.port}${on} is held by ${by}`, {
      port: address.port,
    });
  }
  // ENODEV: what ZeroMQ reports for a name that it cannot resolve, having tried it as an interface too.
  if (code !== undefined && ['EADDRNOTAVAIL', 'ENOTFOUND', 'EAI_AGAIN', 'ENODEV'].includes(code)) {
    return new PdError('ADDRESS_INVALID', `${what}: ${where} is not an address of this machine (${code})`);
  }
  if (code === 'EACCES') {
    return new PdError('PORT_IN_USE', `${what}: this user may not listen on ${where} (EACCES)`);
  }
  return PdError.from(error, 'INTERNAL');
}

/** Throws ADDRESS_INVALID if a socket bound to `host` cannot be connected to from here: a loopback interface that is down, say. */
export async function assertReachable(host: string, what: string): Promise<void> {
  const server = createServer((socket) => socket.destroy());
  try {
    await once(server.listen({ host, port: 0 }), 'listening');
    const { port } = server.address() as AddressInfo;
    const socket = connect(asDestination({ host, port }));
    const connected = withDeadline(once(socket, 'connect'), REACH_TIMEOUT_MS);
    if (!(await connected.finally(() => socket.destroy())))
      throw new Error(`no connection within ${REACH_TIMEOUT_MS} ms`);
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).syscall === 'listen')
      throw await listenError(cause, { host, port: 0 }, what);
    const { message } = PdError.from(cause);
    const fix = isLoopback(host) ? ': is the loopback interface up? (ip link set lo up)' : '';
    throw new PdError(
      'ADDRESS_INVALID',
      `${what}: ${host} cannot be reached from here (${message})${fix}`,
      {},
      { cause },
    );
  } finally {
    server.close();
  }
}

/** Throws PORT_IN_USE if `address` cannot be bound: at once, before a model is loaded. Port 0 always can. */
export async function assertBindable(address: HostPort, what: string): Promise<void> {
  const server = createServer();
  try {
    await once(server.listen({ ...address, exclusive: true }), 'listening');
  } catch (error) {
    throw await listenError(error, address, what);
  }
  await once(server.close(), 'close');
}
