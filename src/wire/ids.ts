/**
 * Request ids, and the rule by which two ends agree on one (docs/protocol.md, "Ids").
 *
 *   header   X-Request-Id: ___prefill_addr_10.0.0.1:8082___decode_addr_10.0.0.2:8084_<32 hex>      made by the proxy
 *   server   cmpl-<header>-<prompt index>   or   chatcmpl-<header>
 *   transfer the server's id: what both ends key KV by
 *   engine   <server id>-<8 hex>             random, so that it differs between producer and consumer
 *
 * A transfer id is never obtained by cutting an id: one that merely ends like a random suffix (`order-20261128`) stays whole. Only a
 * frozen peer sends its engine's id, and only in those is a suffix looked for (`suffixedFor`).
 */
import { formatHostPort, type HostPort, parseHostPort } from '../net/address.ts';

declare const brand: unique symbol;

/** The id that an engine gives a request; unique within the engine, random suffix included. */
export type EngineRequestId = string & { readonly [brand]: 'EngineRequestId' };
/** What the KV of a request is keyed by: the same on producer and consumer. */
export type TransferId = string & { readonly [brand]: 'TransferId' };
/** `<transfer id>#<layer name>`; of a frozen peer, `<engine request id>#<layer name>`. */
export type TensorId = string & { readonly [brand]: 'TensorId' };

/** What pd-doctor asks a listener for, without a pair: nobody has it, and a pd-worker says so without logging anything. */
export const PROBE_TENSOR = 'pd-doctor#probe' as TensorId;

/** The transfer id of the request that the server calls `serverId`; an embedder's own name for a request works too. */
export function transferIdOf(serverId: string): TransferId {
  return serverId as TransferId;
}

/** `engine`: as in vLLM, KV is keyed by the engine's own id, which matches only if neither end randomizes. */
export function kvKeyOf(
  { serverId, requestId }: { readonly serverId: string; readonly requestId: EngineRequestId },
  kvKey: 'transfer' | 'engine',
): TransferId {
  return transferIdOf(kvKey === 'engine' ? requestId : serverId);
}

const SUFFIX = '-'.length + 8;

/** `id` without a trailing `-` and 8 lower-case hex digits; undefined if it does not end that way or has nothing before it. */
export function withoutSuffix(id: string): string | undefined {
  const at = id.length - SUFFIX;
  // By hand: this runs for every tensor, and a regular expression would try every `-` of the id.
  if (at <= 0 || id.charCodeAt(at) !== 0x2d) return undefined;
  for (let i = at + 1; i < id.length; i++) if (!isHexDigit(id.charCodeAt(i))) return undefined;
  return id.slice(0, at);
}

function isHexDigit(code: number): boolean {
  return (code >= 0x30 && code <= 0x39) || (code >= 0x61 && code <= 0x66);
}

const PROXY_PART = '___prefill_addr_.+___decode_addr_.+_[0-9a-f]{32}';
const PROXY_MADE = new RegExp(`^(?:chatcmpl-${PROXY_PART}|cmpl-${PROXY_PART}-\\d+)$`);

/**
 * In which ids of frozen peers a random suffix is looked for. `proxy`: those made by a proxy, with both addresses and 32 hex digits,
 * which cannot be mistaken. `any`: all, for proxies that name requests differently; an id that happens to end in 8 hex digits is then
 * taken for a suffixed one.
 */
export const SUFFIXED_IDS = ['proxy', 'any'] as const;
export type SuffixedIds = (typeof SUFFIXED_IDS)[number];

/** The local request that `foreignId`, an id of a frozen peer, may mean besides the one of exactly that id. */
export function suffixedFor(foreignId: string, which: SuffixedIds | 'none'): TransferId | undefined {
  if (which === 'none') return undefined;
  const stem = withoutSuffix(foreignId);
  if (stem === undefined || (which === 'proxy' && !PROXY_MADE.test(stem))) return undefined;
  return transferIdOf(stem);
}

export function engineRequestId(serverId: string, suffix?: string): EngineRequestId {
  return (suffix === undefined ? serverId : `${serverId}-${suffix}`) as EngineRequestId;
}

export function tensorIdOf(id: EngineRequestId | TransferId, layerName: string): TensorId {
  return `${id}#${layerName}` as TensorId;
}

/** The two halves of a tensor id. Layer names contain no `#` but request ids may, so the last one separates them. */
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

// The same greedy matching as vLLM's, so that an id means the same peer to both.
const DECODE_ADDRESS = /___decode_addr_(.*):(\d+)/;
const PREFILL_ADDRESS = /___prefill_addr_(.*):(\d+)___/;

export type PeerRole = 'prefill' | 'decode';

/** The rank-0 ZMQ address of the other side that a request id carries, or undefined if it carries none. */
export function peerAddressOf(requestId: string, peer: PeerRole): HostPort | undefined {
  const match = (peer === 'decode' ? DECODE_ADDRESS : PREFILL_ADDRESS).exec(requestId);
  if (!match) return undefined;
  try {
    return parseHostPort(`${match[1]}:${match[2]}`);
  } catch {
    return undefined;
  }
}
