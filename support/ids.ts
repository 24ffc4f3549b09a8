/** Ids for tests and benchmarks. */
import { createHash } from 'node:crypto';
import {
  type EngineRequestId,
  proxyRequestId,
  type TransferId,
  transferIdOf,
  withoutSuffix,
} from '../src/wire/ids.ts';

/** The id that a server gives a request that came through a proxy: the same for the same name. */
export function proxiedId(name: string): TransferId {
  const [prefill, decode] = [8082, 8084].map((port) => ({ host: '10.0.0.1', port })) as [Address, Address];
  const uuid = createHash('md5').update(name).digest('hex');
  return transferIdOf(`cmpl-${proxyRequestId(prefill, decode, uuid)}-0`);
}

type Address = Parameters<typeof proxyRequestId>[0];

/** The transfer id of an engine's id. Tests that use this must not use server ids that end like a suffix themselves. */
export function transferOf(requestId: EngineRequestId | string): TransferId {
  return transferIdOf(withoutSuffix(requestId) ?? requestId);
}
