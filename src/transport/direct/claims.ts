/** What a worker says of the cache that another one may write into, and what the other one believes of it. Pure. */

import type { BlockStrides } from '../../device/cuda/paged-write.ts';
import { PdError } from '../../errors.ts';
import { type PagedLayout, runBytes, runOffset, runsPerBlock } from '../../kv/layout.ts';

/** Sent along with the descriptor of the memory. Sizes, strides and offsets in bytes, from the beginning of that memory. */
export interface CacheClaims extends BlockStrides {
  /** Of the memory. */
  readonly bytes: number;
  readonly blocks: number;
  /** Tokens of a block, heads, dimensions of a head, and type: what must be equal for the bytes to mean the same. */
  readonly blockSize: number;
  readonly heads: number;
  readonly headDim: number;
  readonly dtype: string;
  readonly layers: readonly LayerClaim[];
  /** Behind the layers, for whoever tests how fast it writes here: nobody reads it. Older workers have none. */
  readonly scratch?: { readonly offset: number; readonly bytes: number };
  /** That the memory is on. */
  readonly gpu?: { readonly busId: string; readonly name: string };
}

export interface LayerClaim {
  /** As on the wire: `model.layers.0.self_attn.attn`. */
  readonly name: string;
  /** Of block 0. */
  readonly offset: number;
}

const MAX_LAYERS = 1_024;
const MAX_NAME = 256;

/** Strides of a layout. K and V count as two runs wherever they lie, so that families of either end may differ. */
function stridesOf(layout: PagedLayout): BlockStrides {
  const runs = runsPerBlock(layout);
  return {
    runBytes: runBytes(layout),
    runs,
    blockStride: runOffset(layout, layout.numBlocks, 1, 0),
    runStride: runs === 2 ? runOffset(layout, layout.numBlocks, 0, 1) : 0,
  };
}

export function claimsOf(layout: PagedLayout, bytes: number, layers: readonly LayerClaim[]): CacheClaims {
  const { numBlocks: blocks, blockSize, heads, headDim, dtype } = layout;
  return { bytes, blocks, ...stridesOf(layout), blockSize, heads, headDim, dtype, layers };
}

/**
 * Claims as they came from a peer. Throws MESSAGE_INVALID where they are no claims, and DIRECT_REFUSED where a block of them would lie
 * outside of the memory: a write there would fault, or land in what is not its cache.
 */
export function readClaims(value: unknown): CacheClaims {
  const from = record(value, 'claims');
  const runs = whole(from, 'runs');
  if (runs !== 1 && runs !== 2) throw new PdError('MESSAGE_INVALID', `claims: runs is ${runs}, not 1 or 2`);
  const list = from['layers'];
  if (!Array.isArray(list) || list.length === 0 || list.length > MAX_LAYERS)
    throw new PdError('MESSAGE_INVALID', `claims: layers is no list of 1 to ${MAX_LAYERS}`);
  const claims: CacheClaims = {
    bytes: whole(from, 'bytes'),
    blocks: whole(from, 'blocks'),
    runBytes: whole(from, 'runBytes'),
    runs,
    blockStride: whole(from, 'blockStride'),
    runStride: whole(from, 'runStride'),
    blockSize: whole(from, 'blockSize'),
    heads: whole(from, 'heads'),
    headDim: whole(from, 'headDim'),
    dtype: text(from, 'dtype'),
    layers: list.map((layer) => {
      const each = record(layer, 'layer');
      return { name: text(each, 'name'), offset: whole(each, 'offset') };
    }),
    ...readScratch(from['scratch']),
    ...readGpu(from['gpu']),
  };
  checkInside(claims);
  return claims;
}

function readScratch(value: unknown): Pick<CacheClaims, 'scratch'> {
  if (value === undefined) return {};
  const from = record(value, 'scratch');
  return { scratch: { offset: whole(from, 'offset'), bytes: whole(from, 'bytes') } };
}

function readGpu(value: unknown): Pick<CacheClaims, 'gpu'> {
  if (value === undefined) return {};
  const from = record(value, 'gpu');
  return { gpu: { busId: text(from, 'busId'), name: text(from, 'name') } };
}

/** Throws DIRECT_REFUSED where the last byte of a claimed block lies outside of the memory, or K and V or neighbours overlap. */
function checkInside(claims: CacheClaims): void {
  const { bytes, blocks, runs, runBytes, blockStride, runStride, layers, scratch } = claims;
  if (blocks < 1 || blocks > 2 ** 31 - 1 || runBytes < 1)
    throw refused(`the cache has ${blocks} blocks of ${runBytes} bytes`);
  if (blockStride < runBytes || (runs === 2 && runStride < runBytes))
    throw refused(
      `blocks of ${runBytes} bytes lie only ${Math.min(blockStride, runStride || blockStride)} bytes apart`,
    );
  // products of whole numbers up to 2^53 lose digits, and compare right all the same
  const span = (runs - 1) * runStride + (blocks - 1) * blockStride + runBytes;
  for (const { name, offset } of layers) {
    if (offset + span <= bytes) continue;
    throw refused(`layer ${name} ends at byte ${offset + span} of a memory of ${bytes} bytes`);
  }
  if (scratch && scratch.offset + scratch.bytes > bytes)
    throw refused(`its scratch ends at byte ${scratch.offset + scratch.bytes} of a memory of ${bytes} bytes`);
}

/** Throws DIRECT_REFUSED with the first difference that would make other KV of the bytes. Numbers of blocks and strides may differ. */
export function checkSameGeometry(ours: CacheClaims, theirs: CacheClaims): void {
  for (const name of ['blockSize', 'heads', 'headDim', 'dtype', 'runs', 'runBytes'] as const) {
    if (ours[name] !== theirs[name]) throw refused(`${name} is ${theirs[name]} there and ${ours[name]} here`);
  }
  if (ours.layers.length !== theirs.layers.length)
    throw refused(`${theirs.layers.length} layers there, ${ours.layers.length} here`);
  for (let i = 0; i < ours.layers.length; i++) {
    const [here, there] = [ours.layers[i]!.name, theirs.layers[i]!.name];
    if (here !== there) throw refused(`layer ${i} is ${there} there and ${here} here`);
  }
}

function refused(why: string): PdError {
  return new PdError('DIRECT_REFUSED', `the peer's cache cannot be written into: ${why}`);
}

function record(value: unknown, what: string): Readonly<Record<string, unknown>> {
  if (typeof value === 'object' && value !== null && !Array.isArray(value))
    return value as Readonly<Record<string, unknown>>;
  throw new PdError('MESSAGE_INVALID', `claims: ${what} is no object`);
}

function whole(from: Readonly<Record<string, unknown>>, name: string): number {
  const value = from[name];
  if (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0) return value;
  throw new PdError('MESSAGE_INVALID', `claims: ${name} is no whole number`);
}

function text(from: Readonly<Record<string, unknown>>, name: string): string {
  const value = from[name];
  if (typeof value === 'string' && value.length <= MAX_NAME) return value;
  throw new PdError('MESSAGE_INVALID', `claims: ${name} is no text of at most ${MAX_NAME} characters`);
}
