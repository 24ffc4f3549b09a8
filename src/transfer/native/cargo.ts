/**
 * The bytes of PART on a pair: layer by layer, of each run by run (K, then V), of each block by block. On the host they leave and come where
 * they lie; on a GPU through memory of `--kv-buffer-size`, gathered and scattered by the transfer thread's stream.
 */
import type { EventRef, MemoryRef, PagedLayer } from '../../device/device.ts';
import { sliceMemory } from '../../device/memory.ts';
import { PdError } from '../../errors.ts';
import { blockBytes, runBytes, runOffset, runsPerBlock } from '../../kv/layout.ts';
import { passed, type TransferContext } from '../context.ts';
import type { Held } from '../kv-memory.ts';

/** Memory to send from or to receive into. `free`: when no operation uses it any more. */
export interface Cargo {
  readonly regions: readonly MemoryRef[];
  free(): void;
}

/** `layers` and `blocks` of one PART. */
interface Place {
  readonly layers: readonly PagedLayer[];
  readonly blocks: Int32Array;
  /** For messages. */
  readonly what: string;
}

/** The source, as it is to be sent: resolves once it is there, and `ready` and, on a GPU, the blocks are needed no more. */
export async function loadCargo(context: TransferContext, place: Place, ready?: EventRef): Promise<Cargo> {
  const { device, stream } = context;
  if (device.kind === 'host') return { regions: regionsOf(place), free: () => {} };
  const staged = await stage(context, place);
  if (ready) stream.wait(ready);
  device.gatherLayers(tensorsOf(place, staged.memory), place.blocks, stream);
  // where this fails the gather may still write, so its memory is given up
  await passed(context, `gather of ${place.what}`);
  return { regions: [staged.memory], free: () => staged.free() };
}

/** Where a PART is received. `blocks` absent: nowhere that anybody reads. */
export async function makeRoom(context: TransferContext, place: Place, bytes: number): Promise<Cargo> {
  const { device } = context;
  if (device.kind === 'host') {
    if (place.blocks.length > 0) return { regions: regionsOf(place), free: () => {} };
    return { regions: [device.allocate(bytes, 'KV that nobody wants any more')], free: () => {} };
  }
  const staged = await stage(context, place, bytes);
  return { regions: [staged.memory], free: () => staged.free() };
}

/** What has been received, into the blocks; resolves once it lies there. */
export async function unload(context: TransferContext, place: Place, { regions }: Cargo): Promise<void> {
  const { device, stream } = context;
  const [memory] = regions;
  if (device.kind === 'host' || place.blocks.length === 0 || !memory) return;
  device.scatterLayers(tensorsOf(place, memory), place.blocks, stream);
  await passed(context, `scatter of ${place.what}`);
}

async function stage(context: TransferContext, place: Place, bytes = bytesOf(place)): Promise<Held> {
  const { memory, options } = context;
  const staged = await memory.waitFor(bytes, options.timeouts.transfer);
  if (staged) return staged;
  throw new PdError('KV_BUFFER_FULL', `no room for ${bytes} bytes of ${place.what} in --kv-buffer-size`);
}

function bytesOf({ layers, blocks }: Place): number {
  return layers.reduce((sum, { layout }) => sum + blocks.length * blockBytes(layout), 0);
}

function tensorsOf({ layers, blocks }: Place, memory: MemoryRef) {
  let at = 0;
  return layers.map((layer) => {
    const bytes = blocks.length * blockBytes(layer.layout);
    const tensor = sliceMemory(memory, at, bytes);
    at += bytes;
    return { layer, tensor };
  });
}

/** Neighbours are one region. */
function regionsOf({ layers, blocks }: Place): MemoryRef[] {
  const regions: MemoryRef[] = [];
  for (const { layout, memory } of layers) {
    const bytes = runBytes(layout);
    for (let run = 0; run < runsPerBlock(layout); run++) {
      let start = -1;
      let length = 0;
      for (const block of blocks) {
        const offset = runOffset(layout, layout.numBlocks, block, run);
        if (offset === start + length) {
          length += bytes;
          continue;
        }
        if (length > 0) regions.push(sliceMemory(memory, start, length));
        start = offset;
        length = bytes;
      }
      if (length > 0) regions.push(sliceMemory(memory, start, length));
    }
  }
  return regions;
}
