/**
 * What a caller of the engine got wrong, told before anything is sent, in words about its own request. The devices check again what
 * could read or write outside of its memory.
 */
import type { MemoryRef, PagedLayer } from '../device/device.ts';
import { PdError } from '../errors.ts';
import { layerBytes } from '../kv/layout.ts';
import { isDtype } from '../wire/dtype.ts';
import { MAX_DIGEST } from '../wire/limits.ts';
import type { LoadRequest, SendRequest } from './types.ts';

/** Throws REQUEST_INVALID. `device` as in the options: `host` or `cuda:N`. */
export function checkSend(request: SendRequest, device: string): void {
  const { tensorId, shape, dtype, source } = request;
  const context = { tensorId };
  if (!isDtype(dtype)) throw invalid(`${tensorId}: dtype ${JSON.stringify(dtype)} is not known`, context);
  checkDigest(request, tensorId, context);
  if (!shape.every((dim) => Number.isSafeInteger(dim) && dim >= 0)) {
    throw invalid(`${tensorId}: shape [${shape.join(', ')}] is not of whole numbers`, context);
  }
  switch (source.kind) {
    case 'flat':
      // Pageable memory is copied to where a GPU reaches it first.
      if (source.memory.kind !== 'host') checkMemory(source.memory, device, tensorId, context);
      return;
    case 'blocks':
      checkLayer(source.layer, source.blockIds, device, tensorId, context);
  }
}

/** Throws REQUEST_INVALID. */
export function checkLoad(request: LoadRequest, device: string): void {
  const { requestId, layers, blockIds, skipBlocks } = request;
  const context = { requestId };
  checkDigest(request, `load of ${requestId}`, context);
  if (layers.length === 0) throw invalid(`load of ${requestId}: no layers to load`, context);
  if (!Number.isInteger(skipBlocks) || skipBlocks < 0 || skipBlocks > blockIds.length) {
    throw invalid(
      `load of ${requestId}: skipBlocks is ${skipBlocks}, there are ${blockIds.length} blocks`,
      context,
    );
  }
  for (const { name, target } of layers) {
    checkLayer(target, blockIds, device, `load of ${requestId}: ${name}`, context);
  }
}

type Context = ConstructorParameters<typeof PdError>[2];

function checkDigest({ promptDigest }: SendRequest | LoadRequest, what: string, context: Context): void {
  if (promptDigest === undefined || (promptDigest.length > 0 && promptDigest.length <= MAX_DIGEST)) return;
  throw invalid(
    `${what}: promptDigest has ${promptDigest.length} characters, 1 to ${MAX_DIGEST} are allowed`,
    context,
  );
}

function checkLayer(
  layer: PagedLayer,
  blockIds: Int32Array,
  device: string,
  what: string,
  context: Context,
): void {
  checkMemory(layer.memory, device, what, context);
  const { memory, layout } = layer;
  if (memory.bytes < layerBytes(layout)) {
    const needed = `${layout.numBlocks} blocks take ${layerBytes(layout)} bytes`;
    throw invalid(`${what}: ${needed}, the memory of the layer has ${memory.bytes}`, context);
  }
  const { numBlocks } = layout;
  // A plain loop: this list is looked through for each layer of each request.
  for (let index = 0; index < blockIds.length; index++) {
    const id = blockIds[index]!;
    if (id >= 0 && id < numBlocks) continue;
    throw invalid(`${what}: block ${id} is outside of a cache of ${numBlocks} blocks`, context);
  }
}

/** Kernels do not reach pageable host memory, nor another GPU's, nor the host transport a GPU's. */
function checkMemory(memory: MemoryRef, device: string, what: string, context: Context): void {
  const place = memory.kind === 'cuda' ? `cuda:${memory.device}` : memory.kind;
  if (place === device || (place === 'pinned' && device !== 'host')) return;
  throw invalid(
    `${what}: its memory is of kind ${place}, which an engine on ${device} does not reach`,
    context,
  );
}

function invalid(message: string, context: Context): PdError {
  return new PdError('REQUEST_INVALID', message, context);
}
