/** Which address of this machine to tell others. */
import { lookup } from 'node:dns/promises';
import { isIP, isIPv6 } from 'node:net';
import { networkInterfaces } from 'node:os';
import { PdError } from '../errors.ts';
import { isUnspecified } from './address.ts';

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
      throw new PdError('ADDRESS_INVALID', `PD_HOST_IP ${JSON.stringify(told)} is no IP address`);
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

/** The host to tell others for one that is bound: itself, or for `0.0.0.0` and `::` the machine's own address of that family. */
export function announceHost(bindHost: string, options: LocalOptions = {}): string {
  const told = (options.env ?? process.env)['PD_HOST_IP'];
  if (!told && !isUnspecified(bindHost)) return bindHost;
  return localAddress(isIPv6(bindHost) ? 6 : 4, options);
}

/** The IP address of a host name, of `family` where given, asked for once; an address stays as it is. Throws ADDRESS_INVALID. */
export async function hostAddress(host: string, family: Family | 0 = 0): Promise<string> {
  if (isIP(host) !== 0) return host;
  try {
    return (await lookup(host, { family })).address;
  } catch (cause) {
    const { message } = PdError.from(cause);
    throw new PdError(
      'ADDRESS_INVALID',
      `host ${JSON.stringify(host)} has no address: ${message}`,
      {},
      { cause },
    );
  }
}
