/** The hosts of a worker: which addresses are announced to others, whether these can reach them, and the lookup of names. */
import { isIP, isIPv6 } from 'node:net';
import { PdError } from '../errors.ts';
import { isLoopback, isUnspecified } from '../net/address.ts';
import { type Family, hostAddress, isThisHost, type LocalOptions, localAddress } from '../net/local.ts';
import type { WorkerConfig } from './worker-config.ts';

/** What others are told for a host that is bound: for every interface this machine's address, or PD_HOST_IP; else what is bound. */
export function hostForOthers(bound: string): string {
  return isUnspecified(bound) ? localAddress(bound.includes(':') ? 6 : 4) : bound;
}

type Addresses = Pick<WorkerConfig, 'role' | 'http' | 'httpAnnounceHost' | 'transfer' | 'proxy'>;

/** Warnings. Throws CONFIG_INVALID for an address with a zone id that would be announced to another machine, where it names another link. */
export function checkAnnounced(config: Addresses, outside: LocalOptions = {}): string[] {
  const { role, http, httpAnnounceHost, transfer, proxy } = config;
  if (role === 'both') return [];
  const warnings: string[] = [];
  const told = [
    { what: 'HTTP', host: httpAnnounceHost, bound: http.host, flags: ['--host', '--http-announce-host'] },
    {
      what: 'KV',
      host: transfer.announceHost,
      bound: transfer.bind.host,
      flags: ['--kv-host', '--kv-announce-host'],
    },
  ];
  const proxyHere = proxy.every(({ host }) => isThisHost(host, outside));
  for (const { what, host, bound, flags } of told) {
    if (host.includes('%') && isIPv6(host)) {
      const why = `${what} address ${host} carries a zone id, which means something on this machine only`;
      const fix = `bind an address without one (${flags[0]}), or say what others reach (${flags[1]})`;
      if (!proxyHere) throw new PdError('CONFIG_INVALID', `${why}, and the proxy is on another: ${fix}`);
      warnings.push(`${why}: proxy and peers must run here, or ${fix}`);
    } else if (proxy.length > 0 && isLoopback(host) && !isLoopback(bound)) {
      warnings.push(
        `${what} is bound to ${bound}, for which this machine has no address of its own: ${host} is told, so the proxy must be on this host ` +
          `(${bound === '0.0.0.0' ? `${flags[0]} :: where it has IPv6, or ` : ''}${flags[1]})`,
      );
    }
  }
  return warnings;
}

export interface ResolvedHosts {
  readonly config: WorkerConfig;
  /** One line per name, with the address and its family. */
  readonly lines: readonly string[];
}

/**
 * Host names become addresses once, at start: what is bound and told to others is then one and the same everywhere. Those of proxies are
 * looked up again and again by who pings them (transfer/announcer.ts). Throws
 * ADDRESS_INVALID for a name without an address. A name of both families is its IPv4 address, which is
 * what is bound by default.
 */
export async function resolveHosts(config: WorkerConfig): Promise<ResolvedHosts> {
  const lines = new Set<string>();
  const resolve = async (what: string, host: string, family?: Family): Promise<string> => {
    if (isIP(host) !== 0) return host;
    const address = family
      ? await hostAddress(host, family, what)
      : await hostAddress(host, 4).catch(() => hostAddress(host, 0, what));
    lines.add(`${what} ${host} is ${address} (IPv${isIPv6(address) ? 6 : 4})`);
    return address;
  };
  const { http, httpAnnounceHost, transfer } = config;
  const kvHost = await resolve('KV host', transfer.bind.host);
  const httpHost = await resolve('HTTP host', http.host);
  return {
    config: {
      ...config,
      http: { ...http, host: httpHost },
      httpAnnounceHost: await resolve('announced HTTP host', httpAnnounceHost, reachedBy(httpHost)),
      transfer: {
        ...transfer,
        bind: { ...transfer.bind, host: kvHost },
        announceHost: await resolve('announced KV host', transfer.announceHost, reachedBy(kvHost)),
      },
    },
    lines: [...lines],
  };
}

/** The family that what is bound listens to; undefined for `::`, which takes both. */
function reachedBy(bound: string): Family | undefined {
  if (!isIPv6(bound)) return 4;
  return isUnspecified(bound) ? undefined : 6;
}
