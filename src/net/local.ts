/** Which address of this machine to announce to others. */
import { isIP, isIPv4, isIPv6 } from 'node:net';
import { networkInterfaces } from 'node:os';
import { PdError } from '../errors.ts';
import { isLoopback, isUnspecified } from './address.ts';
import { plainAddress } from './allow-list.ts';
import { addressesOf, isLocalhost } from './resolve.ts';

export type Family = 4 | 6;

export interface LocalOptions {
  /** `PD_HOST_IP` in it wins: behind NAT the machine cannot know its own address. */
  readonly env?: Readonly<Record<string, string | undefined>>;
  readonly interfaces?: ReturnType<typeof networkInterfaces>;
}

/** An address of `family` that others may reach: `PD_HOST_IP`, else that of the first interface that is not loopback, else loopback. */
export function localAddress(family: Family, options: LocalOptions = {}): string {
  const given = (options.env ?? process.env)['PD_HOST_IP'];
  if (given) {
    if (isIP(given) === 0)
      throw new PdError('ADDRESS_INVALID', `PD_HOST_IP ${JSON.stringify(given)} is not an IP address`);
    return given;
  }
  const addresses = Object.values(options.interfaces ?? networkInterfaces()).flatMap((list) => list ?? []);
  const found = addresses.find(
    // A link-local IPv6 address needs the name of an interface, which is another one on the peer.
    ({ family: name, internal, address }) =>
      name === `IPv${family}` && !internal && !/^fe[89ab]/i.test(address),
  );
  return found?.address ?? (family === 6 ? '::1' : '127.0.0.1');
}

/**
 * What to bind by default: this machine's IPv4 address that others may reach; if it has none, its IPv6 address; if it has neither,
 * loopback of a family that exists.
 */
export function defaultAddress(options: LocalOptions = {}): string {
  const plain = { ...options, env: {} };
  const found = [localAddress(4, plain), localAddress(6, plain)].find((address) => !isLoopback(address));
  if (found !== undefined) return found;
  const own = ownAddresses(options);
  return own.length > 0 && !own.some((address) => isIPv4(address)) ? '::1' : '127.0.0.1';
}

/** Every address of this machine; link-local IPv6 ones with their zone. */
export function ownAddresses(options: LocalOptions = {}): string[] {
  return Object.entries(options.interfaces ?? networkInterfaces()).flatMap(([name, list]) =>
    (list ?? []).map(({ address }) => (/^fe[89ab]/i.test(address) ? `${address}%${name}` : address)),
  );
}

/** Whether a destination is this machine: loopback, unspecified, or one of its addresses. */
export function isThisHost(host: string, options: LocalOptions = {}): boolean {
  return (
    isLocalhost(host) ||
    isLoopback(host) ||
    isUnspecified(host) ||
    ownAddresses(options).includes(plainAddress(host))
  );
}

/** The host to announce for one that is bound: itself, or for `0.0.0.0` and `::` this machine's address of that family. */
export function announceHost(bindHost: string, options: LocalOptions = {}): string {
  const given = (options.env ?? process.env)['PD_HOST_IP'];
  // v4-mapped becomes IPv4, as in ids and URLs.
  if (!given && !isUnspecified(bindHost)) return plainAddress(bindHost);
  return localAddress(isIPv6(bindHost) ? 6 : 4, options);
}

/** The IP address of a host name, of `family` if given; an address is returned unchanged. Throws ADDRESS_INVALID naming `what`. */
export async function hostAddress(host: string, family: Family | 0 = 0, what = 'host'): Promise<string> {
  let why: unknown = 'none of this family';
  try {
    const [first] = await addressesOf(host, family);
    if (first) return first.address;
  } catch (error) {
    why = error;
  }
  throw PdError.because('ADDRESS_INVALID', `${what} ${JSON.stringify(host)} has no address`, why);
}
