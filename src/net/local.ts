/** Which address of this machine to tell others. */
import { isIP, isIPv4, isIPv6 } from 'node:net';
import { networkInterfaces } from 'node:os';
import { PdError } from '../errors.ts';
import { isLoopback, isUnspecified } from './address.ts';
import { plainAddress } from './allow-list.ts';
import { addressesOf, isLocalhost } from './resolve.ts';

export type Family = 4 | 6;

export interface LocalOptions {
  /** `PD_HOST_IP` in it wins: behind a translated address the machine cannot know better. */
  readonly env?: Readonly<Record<string, string | undefined>>;
  readonly interfaces?: ReturnType<typeof networkInterfaces>;
}

/** An address of the wanted family that other machines may reach: `PD_HOST_IP`, else the first interface that is not loopback, else loopback. */
export function localAddress(family: Family, options: LocalOptions = {}): string {
  const told = (options.env ?? process.env)['PD_HOST_IP'];
  if (told) {
    if (isIP(told) === 0)
      throw new PdError('ADDRESS_INVALID', `PD_HOST_IP ${JSON.stringify(told)} is not an IP address`);
    return told;
  }
  const addresses = Object.values(options.interfaces ?? networkInterfaces()).flatMap((list) => list ?? []);
  const found = addresses.find(
    // A link-local IPv6 address means nothing without the name of an interface, and the peer's has another.
    ({ family: name, internal, address }) =>
      name === `IPv${family}` && !internal && !/^fe[89ab]/i.test(address),
  );
  return found?.address ?? (family === 6 ? '::1' : '127.0.0.1');
}

/**
 * What to bind where nothing was said: this machine's IPv4 address that others may reach; where it has none its IPv6 address; where it
 * has neither, loopback of a family that is there.
 */
export function defaultAddress(options: LocalOptions = {}): string {
  const plain = { ...options, env: {} };
  const found = [localAddress(4, plain), localAddress(6, plain)].find((address) => !isLoopback(address));
  if (found !== undefined) return found;
  const own = ownAddresses(options);
  return own.length > 0 && !own.some((address) => isIPv4(address)) ? '::1' : '127.0.0.1';
}

/** Every address of this machine; those of IPv6 links with their zone. */
export function ownAddresses(options: LocalOptions = {}): string[] {
  return Object.entries(options.interfaces ?? networkInterfaces()).flatMap(([name, list]) =>
    (list ?? []).map(({ address }) => (/^fe[89ab]/i.test(address) ? `${address}%${name}` : address)),
  );
}

/** Whether a destination is this machine: loopback, unspecified, or an address of its own. */
export function isThisHost(host: string, options: LocalOptions = {}): boolean {
  return (
    isLocalhost(host) ||
    isLoopback(host) ||
    isUnspecified(host) ||
    ownAddresses(options).includes(plainAddress(host))
  );
}

/** The host to tell others for one that is bound: itself, or for `0.0.0.0` and `::` the machine's own address of that family. */
export function announceHost(bindHost: string, options: LocalOptions = {}): string {
  const told = (options.env ?? process.env)['PD_HOST_IP'];
  // A v4-mapped address is the IPv4 address that it is: ids and URLs carry that.
  if (!told && !isUnspecified(bindHost)) return plainAddress(bindHost);
  return localAddress(isIPv6(bindHost) ? 6 : 4, options);
}

/** The IP address of a host name, of `family` where given, asked for once; an address stays as it is. Throws ADDRESS_INVALID that names `what`. */
export async function hostAddress(host: string, family: Family | 0 = 0, what = 'host'): Promise<string> {
  let why = 'none of this family';
  let cause: unknown;
  try {
    const [first] = await addressesOf(host, family);
    if (first) return first.address;
  } catch (error) {
    cause = error;
    why = PdError.from(error).message;
  }
  const message = `${what} ${JSON.stringify(host)} has no address: ${why}`;
  throw new PdError('ADDRESS_INVALID', message, {}, { cause });
}
