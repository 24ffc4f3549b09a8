/**
 * The shapes in which vLLM's releases sent one layer's KV of one request (docs/protocol.md, "Tensors"), and which of them a tensor is.
 * Nothing on the wire names the family, so rank, the dimension that is 2 and the cache that it is meant for tell. Pure.
 *
 *   family         shape                                since
 *   tokens         [2, tokens, heads*dim]               0.9.2
 *   mla-tokens     [tokens, dim]                        0.9.2
 *   kv-first       [2, blocks, block, heads, dim]       0.10.2
 *   blocks-first   [blocks, 2, block, heads, dim]       0.10.2, FlashInfer
 *   mla            [blocks, block, dim]                 0.10.2
 */
import { PdError, unreachable } from '../errors.ts';
import type { Dtype } from '../wire/dtype.ts';
import type { PagedLayout } from './layout.ts';

export const WIRE_LAYOUTS = ['tokens', 'kv-first', 'blocks-first'] as const;
/** What `--wire-layout` names: the family that a producer sends, and that a tensor of two blocks is taken for. */
export type WireLayout = (typeof WIRE_LAYOUTS)[number];

export type WireFamily = WireLayout | 'mla-tokens' | 'mla';

/** How the tokens of one request lie in a dense tensor. */
export interface WireForm {
  readonly family: WireFamily;
  /** The families of tokens have no blocks: there each token is one. */
  readonly blocks: number;
  /** Tokens per block. */
  readonly blockSize: number;
}

export interface WireTensor {
  readonly shape: readonly number[];
  readonly dtype: Dtype;
}

/** What a tensor is meant for. */
export interface Destination {
  readonly layout: PagedLayout;
  /** Tokens of the prompt: the tensor must have room for them. */
  readonly tokens: number;
  /** Decides `[2, 2, block, heads, dim]`, two blocks of either family. */
  readonly twoBlocks: 'kv-first' | 'blocks-first';
}

/** Tokens that the tensor has room for; what stands behind the last token of the prompt is junk. */
export function capacity(form: WireForm): number {
  return form.blocks * form.blockSize;
}

/** The form in which a cache of `layout` is sent: `tokens` of the prompt, in blocks of the cache's own size. */
export function wireForm(layout: PagedLayout, wire: WireLayout, tokens: number): WireForm {
  const { family, blockSize } = layout;
  const mla = family === 'mla';
  if (wire === 'tokens') return { family: mla ? 'mla-tokens' : 'tokens', blocks: tokens, blockSize: 1 };
  return { family: mla ? 'mla' : wire, blocks: Math.ceil(tokens / blockSize), blockSize };
}

/** The shape of the tensor that `form` describes, with the heads and head size of `layout`. */
export function formShape(form: WireForm, { heads, headDim }: PagedLayout): number[] {
  const { family, blocks, blockSize } = form;
  switch (family) {
    case 'tokens':
      return [2, blocks, heads * headDim];
    case 'mla-tokens':
      return [blocks, headDim];
    case 'kv-first':
      return [2, blocks, blockSize, heads, headDim];
    case 'blocks-first':
      return [blocks, 2, blockSize, heads, headDim];
    case 'mla':
      return [blocks, blockSize, headDim];
    default:
      return unreachable(family, 'wire family');
  }
}

/** Shape of the tensor of `blocks` blocks as they lie in a cache of `layout`. */
export function wireShape(layout: PagedLayout, blocks: number): number[] {
  return formShape({ family: layout.family, blocks, blockSize: layout.blockSize }, layout);
}

/** True where the shape alone could be two blocks of either family: then `twoBlocks` decides. */
export function isAmbiguous(shape: readonly number[]): boolean {
  return shape.length === 5 && shape[0] === 2 && shape[1] === 2;
}

/** The form of a tensor that came. Throws KV_SHAPE_MISMATCH, naming both shapes and why, where the cache cannot take it. */
export function formOf(tensor: WireTensor, destination: Destination): WireForm {
  const { layout, tokens } = destination;
  const form = familyOf(tensor, destination);
  if (tensor.dtype !== layout.dtype) {
    throw misfit(tensor, layout, `its elements are ${tensor.dtype}, those of the cache ${layout.dtype}`);
  }
  if (capacity(form) < tokens) {
    throw misfit(tensor, layout, `it holds ${capacity(form)} tokens, the prompt has ${tokens}`);
  }
  return form;
}

function familyOf(tensor: WireTensor, { layout, twoBlocks }: Destination): WireForm {
  return layout.family === 'mla' ? latentFamily(tensor, layout) : pairFamily(tensor, layout, twoBlocks);
}

/** For a cache that keeps one latent vector per token. */
function latentFamily(tensor: WireTensor, layout: PagedLayout): WireForm {
  const { shape } = tensor;
  const [first = 0, second = 0] = shape;
  if (shape.length !== 2 && shape.length !== 3) {
    throw misfit(tensor, layout, `an MLA tensor has 2 or 3 dimensions, this one ${shape.length}`);
  }
  const dim = shape.at(-1);
  if (dim !== layout.headDim) {
    throw misfit(tensor, layout, `its vectors have ${dim} elements, those of the cache ${layout.headDim}`);
  }
  return shape.length === 2
    ? { family: 'mla-tokens', blocks: first, blockSize: 1 }
    : { family: 'mla', blocks: first, blockSize: second };
}

/** For a cache that keeps K and V. */
function pairFamily(tensor: WireTensor, layout: PagedLayout, twoBlocks: Destination['twoBlocks']): WireForm {
  const { heads, headDim } = layout;
  const { shape } = tensor;
  const [first = 0, second = 0, third = 0] = shape;
  if (shape.length === 3 && first === 2) {
    if (third === heads * headDim) return { family: 'tokens', blocks: second, blockSize: 1 };
    throw misfit(tensor, layout, `a token has ${third} elements, in the cache ${heads} x ${headDim}`);
  }
  if (shape.length !== 5 || (first !== 2 && second !== 2)) {
    throw misfit(tensor, layout, 'it is of no family with K and V (docs/protocol.md, "Tensors")');
  }
  if (shape[3] !== heads) throw misfit(tensor, layout, `it has ${shape[3]} KV heads, the cache ${heads}`);
  if (shape[4] !== headDim) {
    throw misfit(tensor, layout, `its heads have ${shape[4]} elements, those of the cache ${headDim}`);
  }
  const family = isAmbiguous(shape) ? twoBlocks : first === 2 ? 'kv-first' : 'blocks-first';
  return { family, blocks: family === 'kv-first' ? second : first, blockSize: third };
}

function misfit({ shape, dtype }: WireTensor, layout: PagedLayout, why: string): PdError {
  return new PdError(
    'KV_SHAPE_MISMATCH',
    `tensor [${shape.join(', ')}] ${dtype} does not fit the KV cache ${describeCache(layout)}: ${why}`,
    { shape: shape.join('x'), dtype },
  );
}

function describeCache(layout: PagedLayout): string {
  const shape = wireShape(layout, Number.NaN).map((dim) => (Number.isNaN(dim) ? 'blocks' : dim));
  return `[${shape.join(', ')}] ${layout.dtype}${layout.family === 'mla' ? ' (MLA)' : ''}`;
}
