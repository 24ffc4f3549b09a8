/**
 * Request ids, and the rule that makes producer and consumer agree on one (docs/protocol.md, "Ids").
 *
 *   header   X-Request-Id: ___prefill_addr_10.0.0.1:8082___decode_addr_10.0.0.2:8084_<32 hex>      made by the proxy
 *   server   cmpl-<header>-<prompt index>   or   chatcmpl-<header>
 *   engine   <server id>-<8 hex>             random, so that it differs between producer and consumer
 *   transfer <server id>                     what both ends key KV by
 */
import { formatHostPort, type HostPort, parseHostPort } from '../net/address.ts';

declare const brand: unique symbol;
type Branded<T, B extends string> = T & { readonly [brand]: B };

/** The id that one engine gives a request; unique inside the engine, random suffix included. */
export type EngineRequestId = Branded<string, 'EngineRequestId'>;
/** The engine id without its random suffix: the same on producer and consumer. */
export type TransferId = Branded<string, 'TransferId'>;
/** `<engine or transfer id>#<layer name>`. */
export type TensorId = Branded<string, 'TensorId'>;

/** What pd-doctor asks a listener for, without a pair: nobody has it, and a listener of ours answers so without a word in its log. */
export const PROBE_TENSOR = 'pd-doctor#probe' as TensorId;

const SUFFIX = '-'.length + 8;

/** Cuts a trailing `-[0-9a-f]{8}`, once, and only where something is left in front of it. */
export function transferIdOf(engineId: string): TransferId {
  const at = engineId.length - SUFFIX;
  // By hand: this runs for every tensor several times, and a regular expression would look at every `-` of the id.
  if (at <= 0 || engineId.charCodeAt(at) !== 0x2d) return engineId as TransferId;
  for (let i = at + 1; i < engineId.length; i++)
    if (!isHexDigit(engineId.charCodeAt(i))) return engineId as TransferId;
  return engineId.slice(0, at) as TransferId;
}

function isHexDigit(code: number): boolean {
  return (code >= 0x30 && code <= 0x39) || (code >= 0x61 && code <= 0x66);
}

/**
 * What the KV of a request is known by: its transfer id, or, where everything is keyed as vLLM does, the full id. The brand is the same:
 * to the transfer engine it is the key.
 */
export function keyOf(requestId: EngineRequestId, kvKey: 'transfer' | 'engine' = 'transfer'): TransferId {
  return kvKey === 'engine' ? (requestId as string as TransferId) : transferIdOf(requestId);
}

export function engineRequestId(serverId: string, suffix?: string): EngineRequestId {
  return (suffix === undefined ? serverId : `${serverId}-${suffix}`) as EngineRequestId;
}

export function tensorIdOf(id: EngineRequestId | TransferId, layerName: string): TensorId {
  return `${id}#${layerName}` as TensorId;
}

/** The two halves of a tensor id. Layer names carry no `#`, request ids may, so the last one divides. */
export function splitTensorId(tensorId: string): { readonly requestId: string; readonly layerName: string } {
  const at = tensorId.lastIndexOf('#');
  return at < 0
    ? { requestId: tensorId, layerName: '' }
    : { requestId: tensorId.slice(0, at), layerName: tensorId.slice(at + 1) };
}

/** The id that the proxy sends both instances as `X-Request-Id`. `uuid` is 32 hex digits. */
export function proxyRequestId(prefill: HostPort, decode: HostPort, uuid: string): string {
  return `___prefill_addr_${formatHostPort(prefill)}___decode_addr_${formatHostPort(decode)}_${uuid}`;
}

// The same greedy searches as vLLM's, so that an id means the same peer to both.
const DECODE_ADDRESS = /___decode_addr_(.*):(\d+)/;
const PREFILL_ADDRESS = /___prefill_addr_(.*):(\d+)___/;

export type PeerRole = 'prefill' | 'decode';

/** The rank-0 ZMQ address of the other side that a request id carries, or undefined where it carries none. */
export function peerAddressOf(requestId: string, peer: PeerRole): HostPort | undefined {
  const match = (peer === 'decode' ? DECODE_ADDRESS : PREFILL_ADDRESS).exec(requestId);
  if (!match) return undefined;
  try {
    return parseHostPort(`${match[1]}:${match[2]}`);
  } catch {
    return undefined;
  }
}
