/** Host names become addresses once, at start: what is bound, told to others and connected to is then one and the same everywhere. */
import { isIP, isIPv6 } from 'node:net';
import { type HostPort, isUnspecified } from '../net/address.ts';
import { type Family, hostAddress } from '../net/local.ts';
import { addressesOf } from '../net/resolve.ts';
import type { WorkerConfig } from './worker-config.ts';

export interface ResolvedHosts {
  readonly config: WorkerConfig;
  /** One line per name, with the address and its family. */
  readonly lines: readonly string[];
}

/** Throws ADDRESS_INVALID for a name without an address. A name of both families is its IPv4 address, which is what is bound by default. */
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
  const { http, httpAnnounceHost, kv, proxy } = config;
  const proxyHost = proxy && (await resolve('proxy', proxy.host));
  const kvHost = await resolve('KV host', kv.bind.host);
  const httpHost = await resolve('HTTP host', http.host);
  return {
    config: {
      ...config,
      http: { ...http, host: httpHost },
      httpAnnounceHost: await resolve('announced HTTP host', httpAnnounceHost, reachedBy(httpHost)),
      kv: {
        ...kv,
        bind: { ...kv.bind, host: kvHost },
        announceHost: await resolve('announced KV host', kv.announceHost, reachedBy(kvHost)),
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
