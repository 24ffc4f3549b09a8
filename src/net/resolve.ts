/**
 * The addresses of a host name: all of them, of both families, whatever this machine's own addresses are. Node's own connections ask the
 * resolver for families that the machine has an address of beyond loopback (AI_ADDRCONFIG), so that on one whose only IPv4 address is
 * 127.0.0.1 the name `localhost` has none, or has ::1, where nobody listens.
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

/** IPv4 first, which is what is bound by default. Rejects as `dns.lookup` does where there is none. An address is its own. */
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

/** What to give Node's `connect`, or undici's: every address of a name is tried. */
export const EVERY_ADDRESS = { lookup: lookupAll, autoSelectFamily: true } as const;

/** `code: message` of a connection that failed; where several addresses were tried, what each of them said. */
export function reasonOf(cause: unknown): string {
  if (!(cause instanceof Error)) return String(cause);
  if (cause instanceof AggregateError) return cause.errors.map(reasonOf).join(', ');
  // fetch itself says no more than that it failed.
  if (cause instanceof TypeError && cause.cause instanceof Error) return reasonOf(cause.cause);
  const { code, message } = cause as NodeJS.ErrnoException;
  return code === undefined || message.includes(code) ? message : `${code}: ${message}`;
}
