/** What an end says of itself: to its peers, who must agree before they exchange KV, and to proxies. Pure. */

import type { TransferOptions } from '../config/transfer-options.ts';
import type { ErrorCode } from '../errors.ts';
import type { Fingerprint } from '../wire/fingerprint.ts';
import { PD_VERSION, type PeerHello, type PingMessage } from '../wire/messages.ts';
import { sameDirection } from './context.ts';
import type { ProxyPing } from './types.ts';

export function helloOf(
  options: Pick<TransferOptions, 'sendType' | 'wireLayout' | 'fingerprint'>,
  features: readonly string[] = [],
): PeerHello {
  // what this end sends as long as it does not know that the peer is ours
  const layout = options.wireLayout === 'blocks-first' ? ['layout:blocks-first'] : [];
  const hello = { version: PD_VERSION, features: [...features, ...layout], sendType: options.sendType };
  return options.fingerprint ? { ...hello, fingerprint: options.fingerprint } : hello;
}

/** Without a fingerprint it is the ping of a vLLM worker. */
export function pingOf(
  { fingerprint, sendType }: Pick<TransferOptions, 'fingerprint' | 'sendType'>,
  self: string,
  {
    type,
    httpAddress,
    features,
    events,
    tokenizer,
    started,
  }: Omit<ProxyPing, 'proxies' | 'registry' | 'intervalMs'>,
): PingMessage {
  const message = { type, http_address: httpAddress, zmq_address: self } as const;
  if (!fingerprint) return message;
  const native = {
    version: PD_VERSION,
    digest: fingerprint.digest,
    model: fingerprint.model,
    sendType,
    ...(features && { features }),
    ...(events && { events }),
    ...(tokenizer !== undefined && { tokenizer }),
    ...(started !== undefined && { started }),
  };
  return { ...message, native };
}

export interface Mismatch {
  readonly code: ErrorCode;
  readonly message: string;
}

/** Why `mine` and `theirs` cannot exchange KV, with both values, or undefined. An end without a fingerprint takes any model. */
export function mismatchOf(
  mine: PeerHello,
  theirs: PeerHello,
  self: string,
  peer: string,
): Mismatch | undefined {
  if (!sameDirection(mine.sendType, theirs.sendType)) {
    return {
      code: 'SEND_TYPE_MISMATCH',
      message: `send_type differs: ${self} has ${mine.sendType}, ${peer} has ${theirs.sendType}`,
    };
  }
  const [a, b] = [mine.fingerprint, theirs.fingerprint];
  if (!a || !b || a.digest === b.digest) return undefined;
  return {
    code: 'FINGERPRINT_MISMATCH',
    message: `fingerprints differ: ${self} has ${describe(a, b)}, ${peer} has ${describe(b, a)}`,
  };
}

/** The fields of `one` that differ from `other`; the digest where none does. */
function describe(one: Fingerprint, other: Fingerprint): string {
  const fields = (Object.keys(one) as (keyof Fingerprint)[])
    .filter((key) => key !== 'digest' && one[key] !== other[key])
    .map((key) => `${key} ${String(one[key]).slice(0, 80)}`);
  return `${one.digest.slice(0, 12)} (${fields.join(', ') || 'same fields'})`;
}
