/** Whether others can make anything of the addresses that a worker tells them. */
import { isIPv6 } from 'node:net';
import { PdError } from '../errors.ts';
import { isLoopback } from '../net/address.ts';
import { isThisHost, type LocalOptions } from '../net/local.ts';
import type { WorkerConfig } from './worker-config.ts';

type Addresses = Pick<WorkerConfig, 'role' | 'http' | 'httpAnnounceHost' | 'kv' | 'proxy'>;

/** Warnings. Throws CONFIG_INVALID for an address with a zone id that would be told to another machine: there it names another link. */
export function checkAnnounced(config: Addresses, outside: LocalOptions = {}): string[] {
  const { role, http, httpAnnounceHost, kv, proxy } = config;
  if (role === 'both') return [];
  const warnings: string[] = [];
  const told = [
    { what: 'HTTP', host: httpAnnounceHost, bound: http.host, flags: ['--host', '--http-announce-host'] },
    { what: 'KV', host: kv.announceHost, bound: kv.bind.host, flags: ['--kv-host', '--kv-announce-host'] },
  ];
  const proxyHere = proxy === undefined || isThisHost(proxy.host, outside);
  for (const { what, host, bound, flags } of told) {
    if (host.includes('%') && isIPv6(host)) {
      const why = `${what} address ${host} carries a zone id, which means something on this machine only`;
      const mend = `bind an address without one (${flags[0]}), or say what others reach (${flags[1]})`;
      if (!proxyHere) throw new PdError('CONFIG_INVALID', `${why}, and the proxy is on another: ${mend}`);
      warnings.push(`${why}: proxy and peers must run here, or ${mend}`);
    } else if (proxy !== undefined && isLoopback(host) && !isLoopback(bound)) {
      warnings.push(
        `${what} is bound to ${bound}, for which this machine has no address of its own: ${host} is told, so the proxy must be on this host ` +
          `(${bound === '0.0.0.0' ? `${flags[0]} :: where it has IPv6, or ` : ''}${flags[1]})`,
      );
    }
  }
  return warnings;
}
