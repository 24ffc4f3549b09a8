import { readFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { expect, test } from 'vitest';
import { freePorts } from '../../../src/net/free-ports.ts';

test.each(['127.0.0.1', '::'])('free ports on %s differ, and can be listened on', async (host) => {
  const ports = await freePorts(12, host);
  expect(new Set(ports).size).toBe(12);
  const servers = ports.map((port) => createServer().listen({ host, port }));
  await Promise.all(servers.map((server) => new Promise((resolve) => server.once('listening', resolve))));
  for (const server of servers) server.close();
});

test('the system gives none of them to somebody else in the meantime', async () => {
  const [first, last] = readFileSync('/proc/sys/net/ipv4/ip_local_port_range', 'utf8')
    .split(/\s+/)
    .map(Number);
  for (const port of await freePorts(100, '127.0.0.1')) expect(port < first! || port > last!).toBe(true);
});

test('an address that is not of this machine is an error', async () => {
  await expect(freePorts(1, '192.0.2.1')).rejects.toThrow(/EADDRNOTAVAIL/);
});
