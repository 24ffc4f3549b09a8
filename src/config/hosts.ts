/** The hosts of a worker: which addresses are announced to others, whether these can reach them, and the lookup of names. */
import { isIP, isIPv6 } from 'node:net';
import { PdError } from '../errors.ts';
import { type HostPort, isLoopback, isUnspecified } from '../net/address.ts';
import { type Family, hostAddress, isThisHost, type LocalOptions, localAddress } from '../net/local.ts';
import { addressesOf } from '../net/resolve.ts';
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
  const proxyHere = proxy === undefined || isThisHost(proxy.host, outside);
  for (const { what, host, bound, flags } of told) {
    if (host.includes('%') && isIPv6(host)) {
      const why = `${what} address ${host} carries a zone id, which means something on this machine only`;
      const fix = `bind an address without one (${flags[0]}), or say what others reach (${flags[1]})`;
      if (!proxyHere) throw new PdError('CONFIG_INVALID', `${why}, and the proxy is on another: ${fix}`);
      warnings.push(`${why}: proxy and peers must run here, or ${fix}`);
    } else if (proxy !== undefined && isLoopback(host) && !isLoopback(bound)) {
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
 * Host names become addresses once, at start: what is bound, told to others and connected to is then one and the same everywhere. Throws
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
  const { http, httpAnnounceHost, transfer, proxy } = config;
  const proxyHost = proxy && (await resolve('proxy', proxy.host));
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
      ...(proxy && proxyHost !== undefined && (await reached(proxy, proxyHost))),
    },
    lines: [...lines],
  };
}

/** The proxy may be bound to any address of its name, and not be up yet: the first is tried first, then the others. */
async function reached({ host, port }: HostPort, first: string): Promise<Pick<WorkerConfig, 'proxy'>> {
  const others = (await addressesOf(host)).map(({ address }) => address).filter((one) => one !== first);
  return { proxy: { host: first, port, ...(others.length > 0 && { otherHosts: others }) } };
}

/** The family that what is bound listens to; undefined for `::`, which takes both. */
function reachedBy(bound: string): Family | undefined {
  if (!isIPv6(bound)) return 4;
  return isUnspecified(bound) ? undefined : 6;
}
