import { isIP, isIPv6 } from 'node:net';
import { PdError } from '../errors.ts';

/** A host (name or IP literal, without brackets) and a port. */
export interface HostPort {
  readonly host: string;
  readonly port: number;
}

/** `10.0.0.1:80`, `[::1]:80`: an IPv6 address that a port follows is put in brackets. */
export function formatHostPort({ host, port }: HostPort): string {
  // Asked for every request; the sure test is a long expression.
  return `${host.includes(':') && isIPv6(host) ? `[${host}]` : host}:${port}`;
}

/**
 * Reads `host:port` or `[v6]:port`, zone id included. Throws ADDRESS_INVALID naming `what`. Hosts come from request ids too, so only
 * the characters of names and addresses are allowed: `*`, `;` and `/` have a meaning in a ZeroMQ endpoint.
 */
export function parseHostPort(text: string, what = 'address'): HostPort {
  const match = /^(?:\[([^\]]+)\]|([A-Za-z0-9._-]{1,253})):(\d{1,5})$/.exec(text);
  const host = match?.[1] ?? match?.[2];
  const port = Number(match?.[3]);
  if (!host || port > 65535 || (match?.[1] !== undefined && !isIPv6(match[1]))) {
    throw new PdError('ADDRESS_INVALID', `${what} ${JSON.stringify(text)} is not HOST:PORT`);
  }
  return { host, port };
}

/** Where an HTTP server is, without a path. */
export function httpUrl(address: HostPort, tls = false): string {
  return `${tls ? 'https' : 'http'}://${formatHostPort(address)}`;
}

/** A ZeroMQ endpoint for TCP. */
export function zmqEndpoint(address: HostPort): string {
  return `tcp://${formatHostPort(address)}`;
}

/** Addresses that mean "every interface" when bound; as a destination they mean this host. */
export function isUnspecified(host: string): boolean {
  return host === '0.0.0.0' || host === '::' || (isIP(host) === 6 && /^[0:]+$/.test(host));
}

/** `127.0.0.0/8` and `::1`, also as v4-mapped. */
export function isLoopback(host: string): boolean {
  const plain = host.replace(/^::ffff:(?=\d+\.)/i, '');
  return isIP(plain) === 4 ? plain.startsWith('127.') : /^(0*:)*0*1$/.test(plain) && isIPv6(plain);
}

/** The destination that an unspecified address stands for: `0.0.0.0` and `::` become loopback of their family. */
export function asDestination(address: HostPort): HostPort {
  if (!isUnspecified(address.host)) return address;
  return { host: isIPv6(address.host) ? '::1' : '127.0.0.1', port: address.port };
}
