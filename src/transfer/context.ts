/** What every part of one transfer engine shares, and what all of them log, count and wait for. */

import type { TransferOptions } from '../config/transfer-options.ts';
import type { Device, Stream } from '../device/device.ts';
import type { EventPoller } from '../device/poller.ts';
import type { ErrorCode, PdError } from '../errors.ts';
import type { Logger, RateLimitedLog } from '../observability/log.ts';
import type { MetricsPage } from '../observability/metrics.ts';
import type { OpenOptions, Pair, Transport } from '../transport/transport.ts';
import { splitTensorId, suffixedFor, type TensorId, type TransferId } from '../wire/ids.ts';
import type { PeerHello, SendType } from '../wire/messages.ts';
import type { Deadlines } from './deadlines.ts';
import type { Failures } from './failures.ts';
import type { KvMemory } from './kv-memory.ts';

export interface TransferContext {
  readonly options: TransferOptions;
  /** This engine's routing id: its ROUTER's `host:port` as told to others. */
  readonly self: string;
  /** What this end says of itself at NEW. */
  readonly hello: PeerHello;
  readonly device: Device;
  readonly transport: Transport;
  /** Copies into and out of transfer memory. Each pair has a stream of its own inside the transport. */
  readonly stream: Stream;
  readonly poller: EventPoller;
  readonly memory: KvMemory;
  readonly deadlines: Deadlines;
  readonly metrics: MetricsPage;
  readonly log: Logger;
  readonly limited: RateLimitedLog;
  readonly failures: Failures;
}

/** PUT and PUT_ASYNC differ only in what the connector waits for: on the wire they are one. */
export function sameDirection(a: SendType, b: SendType): boolean {
  return (a === 'GET') === (b === 'GET');
}

/** The request of ours that a tensor of a peer which is not ours may mean beside that of exactly its id (wire/ids.ts). */
export function standsFor({ options }: TransferContext, tensorId: TensorId): TransferId | undefined {
  const which = options.kvKey === 'engine' ? 'none' : options.suffixedIds;
  return suffixedFor(splitTensorId(tensorId).requestId, which);
}

/** The fields that every debug line about a tensor carries. */
export function tensorFields(
  context: TransferContext,
  tensor: { readonly tensorId: TensorId; readonly shape?: readonly number[]; readonly dtype?: string },
  peer?: string,
) {
  return {
    // As its sender calls it; between ours the transfer id.
    transferId: splitTensorId(tensor.tensorId).requestId,
    tensorId: tensor.tensorId,
    ...(peer === undefined ? {} : { peer }),
    ...(tensor.shape === undefined ? {} : { shape: tensor.shape }),
    ...(tensor.dtype === undefined ? {} : { dtype: tensor.dtype }),
    bufferUsed: context.memory.bufferUsed,
    poolUsed: context.memory.poolUsed,
  };
}

/** A debug line about a tensor; costs nothing where debug is off. */
export function logTensor(
  context: TransferContext,
  what: string,
  tensor: { readonly tensorId: TensorId; readonly shape?: readonly number[]; readonly dtype?: string },
  peer?: string,
): void {
  if (!context.log.isLevelEnabled('debug')) return;
  context.log.debug(tensorFields(context, tensor, peer), `${what} ${tensor.tensorId}`);
}

/** As `Transport.open`, within `timeouts.pairInit`. Both ends must join it, so what each takes itself for is logged first. */
export function joinPair(
  { log, transport, options }: TransferContext,
  ends: Omit<OpenOptions, 'timeoutMs'>,
): Promise<Pair> {
  const { peer, rank } = ends;
  const by = transport.kind === 'nccl' ? 'ncclCommInitRank' : 'host transport';
  log.info({ peer, rank, size: 2 }, `joining a communicator with ${peer}: rank ${rank}, size 2 (${by})`);
  return transport.open({ ...ends, timeoutMs: options.timeouts.pairInit });
}

export function logJoined({ log, self }: TransferContext, { peer, rank }: Pair): void {
  const way = rank === 0 ? '👉' : '👈';
  log.info({ peer }, `🤝ncclCommInitRank Success, ${self}${way}${peer}, MyRank:${rank}`);
}

/** Failures of peers that pd_protocol_errors_total counts, and under which kind. */
const COUNTED = {
  PEER_ANSWER_TIMEOUT: 'timeout',
  PAIR_INIT_TIMEOUT: 'timeout',
  TRANSFER_TIMEOUT: 'timeout',
  PEER_UNREACHABLE: 'timeout',
  PEER_LOST: 'peer_lost',
  FINGERPRINT_MISMATCH: 'fingerprint',
  SEND_TYPE_MISMATCH: 'send_type',
} as const satisfies Partial<Record<ErrorCode, string>>;

/** A pair with `peer` came to nothing or broke: noted, and counted where that is the peer's failure. */
export function countFailure(context: TransferContext, peer: string, error: PdError): void {
  const { code } = error;
  context.failures.note('pair', peer, error);
  const kind = Object.hasOwn(COUNTED, code) ? COUNTED[code as keyof typeof COUNTED] : undefined;
  if (kind) context.metrics.inc('pd_protocol_errors_total', 1, kind);
}

/** Resolves when the stream has done all that is enqueued on it now. */
export function passed({ poller, stream, options }: TransferContext, what: string): Promise<void> {
  return poller.drained(stream, options.timeouts.transfer, what);
}
