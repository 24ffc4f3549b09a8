/**
 * The addresses of a host name: all of them, of both families, whatever addresses this machine itself has. Node's own connections only
 * ask the resolver for families in which the machine has an address beyond loopback (AI_ADDRCONFIG); if its only IPv4 address is
 * 127.0.0.1, the name `localhost` then has no address, or ::1, where nothing listens.
 */
import { type LookupAddress, lookup } from 'node:dns';
import { isIP, type LookupFunction } from 'node:net';
import { promisify } from 'node:util';

const ask = promisify(lookup);

/** Loopback of both families (RFC 6761), whatever /etc/hosts says. */
const LOOPBACK: readonly LookupAddress[] = [
  { address: '127.0.0.1', family: 4 },
  { address: '::1', family: 6 },
];

/** The name, or one below it. */
export function isLocalhost(host: string): boolean {
  return /^(.+\.)?localhost\.?$/i.test(host);
}

/** IPv4 first, which is what is bound by default. An address is returned unchanged. Rejects as `dns.lookup` does if there is none. */
export async function addressesOf(host: string, family: 0 | 4 | 6 = 0): Promise<readonly LookupAddress[]> {
  const version = isIP(host);
  if (version !== 0) return [{ address: host, family: version }];
  const all = isLocalhost(host)
    ? LOOPBACK
    : // hints: without AI_ADDRCONFIG
      await ask(host, { all: true, family, hints: 0, order: 'ipv4first' });
  return family === 0 ? all : all.filter((one) => one.family === family);
}

/** For `lookup` of Node's sockets. With `autoSelectFamily` they try the addresses one after the other. */
export const lookupAll: LookupFunction = (host, options, done) => {
  const family = options.family === 4 || options.family === 6 ? options.family : 0;
  addressesOf(host, family).then(
    (all) => {
      const [first] = all;
      if (!first) done(Object.assign(new Error(`${host} has no address`), { code: 'ENOTFOUND' }), '');
      else if (options.all) done(null, [...all]);
      else done(null, first.address, first.family);
    },
    (error: NodeJS.ErrnoException) => done(error, ''),
  );
};

/**
 * Options for Node's `connect`, or undici's, to try every address of a name. Node gives up an address after 250 ms unless told otherwise, and
 * looks at its clock before its sockets: a program that is busy for that long loses a connection that was made at once. Short enough that
 * a probe (2 s) comes to the second of two.
 */
export const EVERY_ADDRESS = {
  lookup: lookupAll,
  autoSelectFamily: true,
  autoSelectFamilyAttemptTimeout: 1_000,
} as const;

/** `code: message` of a failed connection; of each address, if several were tried. */
export function reasonOf(cause: unknown): string {
  if (!(cause instanceof Error)) return String(cause);
  if (cause instanceof AggregateError) return cause.errors.map(reasonOf).join(', ');
  // fetch itself only says that it failed.
  if (cause instanceof TypeError && cause.cause instanceof Error) return reasonOf(cause.cause);
  const { code, message } = cause as NodeJS.ErrnoException;
  return code === undefined || message.includes(code) ? message : `${code}: ${message}`;
}
