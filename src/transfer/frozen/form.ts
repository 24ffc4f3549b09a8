/**
 * In which family blocks leave. Between ours as the cache lies; a peer that is not ours, or of which that is not known yet, gets what
 * `wireLayout` names. What leaves in another form than the cache's own is announced without our fields, and alone (see `sentAs`).
 */

import type { TransferOptions } from '../../config/transfer-options.ts';
import type { Device, MemoryRef, Stream } from '../../device/device.ts';
import { capacity, formShape, type WireForm, type WireLayout, wireForm } from '../../kv/families.ts';
import { blockBytes, type PagedLayout } from '../../kv/layout.ts';
import { type CopyPlan, planCopy } from '../../kv/reblock.ts';
import { tensorBytes } from '../../wire/dtype.ts';
import type { PeerHello } from '../../wire/messages.ts';
import type { SendRequest } from '../types.ts';

/** A send whose blocks are gathered by a plan, into a tensor of another family than the cache's. */
export interface FormedRequest extends SendRequest {
  readonly plan?: CopyPlan;
}

/** What two blocks of either family are taken for. */
export type TwoBlocks = 'kv-first' | 'blocks-first';

/** Of a kept tensor that was gathered from blocks: how its tokens lie. */
export interface DenseBlocks {
  /** As if the tensor were a cache of so many blocks. */
  readonly layout: PagedLayout;
  readonly tokens: number;
}

/** `request` as it leaves for a peer that is not ours. Wrong shapes are left for the check of the source to name. */
export function formed(request: SendRequest, { wireLayout }: TransferOptions): FormedRequest {
  const { source } = request;
  if (wireLayout === undefined || source.kind !== 'blocks') return request;
  const { layout, memory } = source.layer;
  const blocks = source.blockIds.length;
  if (tensorBytes(request.shape, request.dtype) !== blocks * blockBytes(layout)) return request;
  const form = frozenForm(
    { layout: { ...layout, numBlocks: blocks }, tokens: tokensOf(request) },
    wireLayout,
  );
  if (!form) return request;
  const plan = planCopy(layout, source.blockIds, form, {
    tokens: Math.min(tokensOf(request), capacity(form)),
  });
  return {
    ...request,
    shape: formShape(form, layout),
    plan,
    source: { ...source, layer: { memory, layout } },
  };
}

/** The form for peers that are not ours, where it is another than the cache's own. */
export function frozenForm(
  { layout, tokens }: DenseBlocks,
  wire: WireLayout | undefined,
): WireForm | undefined {
  if (wire === undefined || wire === layout.family || (layout.family === 'mla' && wire !== 'tokens'))
    return undefined;
  return wireForm(layout, wire, tokens);
}

/** How a tensor of `request` lies, so that it can be brought into another form when it is asked for. */
export function denseBlocks(request: SendRequest): DenseBlocks | undefined {
  const { source } = request;
  if (source.kind !== 'blocks') return undefined;
  return { layout: { ...source.layer.layout, numBlocks: source.blockIds.length }, tokens: tokensOf(request) };
}

/** Enqueues the copy of a dense tensor into `target`, of `form`. */
export function reform(
  device: Device,
  { layout, tokens }: DenseBlocks,
  source: MemoryRef,
  target: MemoryRef,
  form: WireForm,
  stream: Stream,
): void {
  const all = Int32Array.from({ length: layout.numBlocks }, (_, index) => index);
  device.reblock('gather', source, target, planCopy(layout, all, form, { tokens }), stream);
}

/**
 * What two blocks in a message of a peer are: undefined, as in a cache of ours, where the message carries our fields; else what the peer
 * says of itself, or what this end has been told to expect.
 */
export function sentAs(
  { wireLayout }: TransferOptions,
  hello: PeerHello | undefined,
  withOurFields: boolean,
): TwoBlocks | undefined {
  if (withOurFields) return undefined;
  if (hello) return hello.features.includes('layout:blocks-first') ? 'blocks-first' : 'kv-first';
  return wireLayout === 'blocks-first' ? 'blocks-first' : 'kv-first';
}

function tokensOf({ numTokens, source }: SendRequest): number {
  if (source.kind !== 'blocks') return 0;
  const room = source.blockIds.length * source.layer.layout.blockSize;
  return Math.min(numTokens ?? room, room);
}
