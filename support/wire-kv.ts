/** The KV of one request and layer as wire tensors of every family, element by element according to the shapes: slow and simple. */
import { formShape, type WireForm } from '../src/kv/families.ts';
import { type PagedLayout, runOffset, runsPerBlock } from '../src/kv/layout.ts';
import { DTYPE_BYTES } from '../src/wire/dtype.ts';

export type Dimensions = Pick<PagedLayout, 'heads' | 'headDim' | 'dtype'>;

/** Byte offset of K (0) or V (1) of one token, by row-major indexing of the tensor's shape. */
function offsetOf(form: WireForm, half: number, token: number, dimensions: Dimensions): number {
  const bytes = dimensions.heads * dimensions.headDim * DTYPE_BYTES[dimensions.dtype];
  const [block, slot] = [Math.floor(token / form.blockSize), token % form.blockSize];
  switch (form.family) {
    case 'tokens':
      return (half * form.blocks + token) * bytes;
    case 'mla-tokens':
      return token * bytes;
    case 'kv-first':
      return ((half * form.blocks + block) * form.blockSize + slot) * bytes;
    case 'blocks-first':
      return ((block * 2 + half) * form.blockSize + slot) * bytes;
    case 'mla':
      return (block * form.blockSize + slot) * bytes;
  }
}

/** Bytes of token `token`, K or V: neighbours differ. */
export function tokenBytes(half: number, token: number, dimensions: Dimensions, seed: number): Uint8Array {
  const bytes = dimensions.heads * dimensions.headDim * DTYPE_BYTES[dimensions.dtype];
  return Uint8Array.from(
    { length: bytes },
    (_, i) => (seed + 151 * half + 37 * token + 5 * i + (token >> 3)) & 255,
  );
}

/** Bytes of the tensor of `form`, with `junk` after the last token. */
export function wireTensor(
  form: WireForm,
  tokens: number,
  dimensions: Dimensions,
  seed: number,
  junk = 0xee,
): Uint8Array {
  const halves = form.family === 'mla' || form.family === 'mla-tokens' ? 1 : 2;
  const token = dimensions.heads * dimensions.headDim * DTYPE_BYTES[dimensions.dtype];
  const tensor = new Uint8Array(form.blocks * form.blockSize * halves * token).fill(junk);
  for (let half = 0; half < halves; half++) {
    for (let at = 0; at < tokens; at++) {
      tensor.set(tokenBytes(half, at, dimensions, seed), offsetOf(form, half, at, dimensions));
    }
  }
  return tensor;
}

function tokenSize({ heads, headDim, dtype }: Dimensions): number {
  return heads * headDim * DTYPE_BYTES[dtype];
}

/** One request's KV in one layer of a paged cache, as the CPU sees it. */
export interface CachedKv {
  readonly bytes: Uint8Array;
  readonly layout: PagedLayout;
  readonly blocks: readonly number[];
}

/** K (0) or V (1) of one token in the cache. */
export function tokenInCache({ bytes, layout, blocks }: CachedKv, half: number, token: number): Uint8Array {
  const block = blocks[Math.floor(token / layout.blockSize)]!;
  const size = tokenSize(layout);
  const at = runOffset(layout, layout.numBlocks, block, half) + (token % layout.blockSize) * size;
  return bytes.subarray(at, at + size);
}

/** Tokens `from` to `to` in which cache and tensor differ. */
export function kvDifferences(
  cached: CachedKv,
  tensor: Uint8Array,
  form: WireForm,
  from: number,
  to: number,
): string[] {
  const { layout } = cached;
  const wrong: string[] = [];
  for (let half = 0; half < runsPerBlock(layout); half++) {
    for (let token = from; token < to; token++) {
      const at = offsetOf(form, half, token, layout);
      const inTensor = tensor.subarray(at, at + tokenSize(layout));
      if (Buffer.compare(tokenInCache(cached, half, token), inTensor) !== 0) {
        wrong.push(`${half === 0 ? 'K' : 'V'} of token ${token}`);
      }
    }
  }
  return wrong;
}

/** The cache as a tensor of that form; `tokens` are filled, with zeros after them. */
export function tensorOfCache(cached: CachedKv, form: WireForm, tokens: number): Uint8Array {
  const { layout } = cached;
  const elements = formShape(form, layout).reduce((a, b) => a * b, 1);
  const tensor = new Uint8Array(elements * DTYPE_BYTES[layout.dtype]);
  for (let half = 0; half < runsPerBlock(layout); half++) {
    for (let token = 0; token < tokens; token++) {
      tensor.set(tokenInCache(cached, half, token), offsetOf(form, half, token, layout));
    }
  }
  return tensor;
}
