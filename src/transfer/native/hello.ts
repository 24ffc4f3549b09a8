/** What two ends of the native hand-over say of themselves first, and what must fit for them to exchange KV. Pure. */
import { NATIVE_FEATURE } from '../../wire/overlap.ts';
import { helloOf, type Mismatch, mismatchOf } from '../hello.ts';
import type { NativeInit } from './channel.ts';
import type { HelloMessage, NativeTransport } from './messages.ts';

/** Ends the routing id of a native connection: beside a frozen one from the same end, of which a ROUTER knows one by each id. */
const SUFFIX = '#native';

export function identityOf(self: string): string {
  return `${self}${SUFFIX}`;
}

/** `host:port` of whoever has connected under that routing id. */
export function peerOf(identity: Buffer): string {
  const text = identity.toString();
  return text.endsWith(SUFFIX) ? text.slice(0, -SUFFIX.length) : text;
}

export function nativeHello(options: Parameters<typeof helloOf>[0], init: NativeInit): HelloMessage {
  const { nonce, shape, transports, direct } = init;
  return {
    cmd: 'HELLO',
    from: nonce,
    hello: helloOf(options, [NATIVE_FEATURE]),
    cache: shape,
    transports,
    ...(direct && { direct }),
  };
}

/** What an end says of how its KV may travel. */
export interface Ways {
  readonly transports: readonly NativeTransport[];
  readonly direct?: HelloMessage['direct'] | undefined;
}

/** Why bytes between two GPUs do not go by `direct`: the label of `pd_native_fallbacks`. */
export const FALLBACK_REASONS = ['off', 'peer_off', 'other_host', 'refused', 'late'] as const;

export interface Fallback {
  readonly reason: (typeof FALLBACK_REASONS)[number];
  /** In words. */
  readonly why: string;
}

/** What rules `direct` out before it is tried; undefined where it may be tried. */
export function directFallback(mine: Ways, theirs: Ways): Fallback | undefined {
  const why = 'does not offer direct (--transport, no GPU, or its log says why)';
  if (!mine.direct || !mine.transports.includes('direct'))
    return { reason: 'off', why: `this worker ${why}` };
  if (!theirs.direct || !theirs.transports.includes('direct'))
    return { reason: 'peer_off', why: `the peer ${why}` };
  if (theirs.direct.bootId === mine.direct.bootId) return undefined;
  return { reason: 'other_host', why: 'the peer is on another host' };
}

/** The way by a pair that both have, `mine` first. */
export function pairWay(mine: Ways, theirs: Ways): NativeTransport | undefined {
  return mine.transports.find((way) => way !== 'direct' && theirs.transports.includes(way));
}

/** Why `mine` and `theirs` cannot exchange KV, with both values, or undefined. */
export function refusalOf(
  mine: HelloMessage,
  theirs: HelloMessage,
  self: string,
  peer: string,
): Mismatch | undefined {
  // PUT, PUT_ASYNC and GET mean one thing here
  const theirHello = { ...theirs.hello, sendType: mine.hello.sendType };
  const other = mismatchOf(mine.hello, theirHello, self, peer);
  if (other) return other;
  for (const name of ['blockSize', 'layers', 'blockBytes'] as const) {
    if (mine.cache[name] === theirs.cache[name]) continue;
    const message = `caches differ: ${self} has ${name} ${mine.cache[name]}, ${peer} has ${theirs.cache[name]}`;
    return { code: 'FINGERPRINT_MISMATCH', message };
  }
  if (mine.transports.some((transport) => theirs.transports.includes(transport))) return undefined;
  const ways = ({ transports }: HelloMessage) => transports.join(', ') || 'none';
  const message = `no way for KV is open at both ends: ${self} has ${ways(mine)}, ${peer} has ${ways(theirs)}`;
  return { code: 'TRANSPORT_MISMATCH', message };
}
