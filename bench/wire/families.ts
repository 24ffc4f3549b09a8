/** Tensors of every family and of different block sizes: into our paged cache on the device, and out of it in the form of --wire-layout. */
import { formShape, WIRE_LAYOUTS, type WireForm, type WireLayout, wireShape } from '../../src/kv/families.ts';
import { layerBytes, type PagedLayout, runBytes, runOffset, runsPerBlock } from '../../src/kv/layout.ts';
import { formatHostPort } from '../../src/net/address.ts';
import type { TransferEngine } from '../../src/transfer/engine.ts';
import type { TensorId, TransferId } from '../../src/wire/ids.ts';
import { proxiedId } from '../../support/ids.ts';
import { type PythonPeer, seededBytes, sha256 } from '../../support/python-peer.ts';
import { type CachedKv, kvDifferences, tensorOfCache } from '../../support/wire-kv.ts';
import { bytesOf, must, nameOf, type Rig } from './rig.ts';

interface Family {
  readonly layout: PagedLayout;
  readonly incoming: readonly WireForm[];
  readonly outgoing: Readonly<Record<WireLayout, WireForm>>;
  readonly tokens: number;
  readonly blocks: readonly number[];
}

const SEND_TYPES = ['PUT', 'GET'] as const;
const LAYERS = 2;

export async function checkFamilies(rig: Rig, peer: PythonPeer): Promise<void> {
  for (const sendType of SEND_TYPES) {
    const consumer = await rig.engine({ sendType });
    for (const family of families(rig.options.small)) {
      for (const form of family.incoming) {
        await rig.row(`families, ${sendType} into our cache`, describe(form, family), () =>
          intoCache(rig, consumer, sendType, peer, form, family),
        );
      }
    }
    await consumer.dispose();
    for (const wireLayout of WIRE_LAYOUTS) {
      const producer = await rig.engine({ sendType, wireLayout });
      for (const family of families(rig.options.small)) {
        const form = family.outgoing[wireLayout];
        await rig.row(`families, ${sendType} of our cache`, describe(form, family), () =>
          outOfCache(rig, producer, sendType, peer, form, family),
        );
      }
      await producer.dispose();
    }
  }
}

function families(small: boolean): Family[] {
  const blockSize = small ? 4 : 16;
  const tokens = small ? 11 : 300;
  const blocks = small ? [5, 3, 9] : Array.from({ length: 19 }, (_, i) => (i * 23 + 5) % 64);
  const numBlocks = small ? 16 : 64;
  const whole = (size: number, more = 0) => Math.ceil(tokens / size) + more;
  const form = (family: WireForm['family'], count: number, size: number): WireForm => ({
    family,
    blocks: count,
    blockSize: size,
  });
  const common = { numBlocks, blockSize, dtype: 'bfloat16' } as const;
  const pairs: Family = {
    layout: { ...common, family: 'kv-first', heads: small ? 2 : 8, headDim: small ? 8 : 128 },
    incoming: [
      form('tokens', tokens, 1),
      form('kv-first', whole(blockSize), blockSize),
      form('kv-first', whole(3), 3),
      form('kv-first', whole(2 * blockSize, 2), 2 * blockSize),
      form('blocks-first', whole(blockSize), blockSize),
      form('blocks-first', whole(2 * blockSize, 2), 2 * blockSize),
    ],
    outgoing: {
      tokens: form('tokens', tokens, 1),
      'kv-first': form('kv-first', blocks.length, blockSize),
      'blocks-first': form('blocks-first', blocks.length, blockSize),
    },
    tokens,
    blocks,
  };
  const latent: Family = {
    layout: { ...common, family: 'mla', heads: 1, headDim: small ? 24 : 576 },
    incoming: [
      form('mla-tokens', tokens, 1),
      form('mla', whole(blockSize), blockSize),
      form('mla', whole(64), 64),
    ],
    outgoing: {
      tokens: form('mla-tokens', tokens, 1),
      'kv-first': form('mla', blocks.length, blockSize),
      'blocks-first': form('mla', blocks.length, blockSize),
    },
    tokens,
    blocks,
  };
  return [pairs, latent];
}

async function intoCache(
  rig: Rig,
  consumer: TransferEngine,
  sendType: 'PUT' | 'GET',
  peer: PythonPeer,
  form: WireForm,
  { layout, tokens, blocks }: Family,
): Promise<string> {
  const shape = formShape(form, layout);
  const layers = Array.from({ length: LAYERS }, (_, layer) => {
    const before = seededBytes([layerBytes(layout)], 'uint8', 100 + layer);
    const target = { memory: rig.upload(before, `cache of layer ${layer}`), layout };
    return { name: `layer.${layer}`, before, target };
  });
  const id = proxiedId(`${sendType}-${form.family}-${form.blockSize}`);
  for (const [seed, { name }] of layers.entries()) {
    const fields = { shape, dtype: layout.dtype, seed };
    if (sendType === 'GET') await peer.ask('keep', { tensor_id: `${id}#${name}`, ...fields });
    else {
      const to = { peer: formatHostPort(consumer.address), tensor_id: `${id}-0123abcd#${name}` };
      const { answer } = await peer.ask('put', { ...to, ...fields });
      must(answer === '0', `ours answered ${answer}`);
    }
  }
  const blockIds = Int32Array.from(blocks);
  const request = { requestId: `${id}-89abcdef`, transferId: id, blockIds };
  await consumer.load({ ...request, peer: peer.address, layers, skipBlocks: 1, numTokens: tokens });
  for (const [seed, { before, target }] of layers.entries()) {
    const after: CachedKv = { bytes: rig.download(target.memory), layout, blocks };
    const wrong = kvDifferences(
      after,
      seededBytes(shape, layout.dtype, seed),
      form,
      layout.blockSize, // the first block was there
      tokens,
    );
    must(wrong.length === 0, `layer ${seed}: ${wrong.length} differ, the first ${wrong[0]}`);
    mustBeAsBefore(after, before);
  }
  consumer.finish(request.transferId);
  return `${tokens} tokens, ${LAYERS} layers of ${bytesOf({ shape, dtype: layout.dtype })}`;
}

/** The skipped block, and all blocks that are not the request's. */
function mustBeAsBefore({ bytes, layout, blocks }: CachedKv, before: Uint8Array): void {
  const written = new Set(blocks.slice(1));
  for (let block = 0; block < layout.numBlocks; block++) {
    if (written.has(block)) continue;
    for (let run = 0; run < runsPerBlock(layout); run++) {
      const from = runOffset(layout, layout.numBlocks, block, run);
      const to = from + runBytes(layout);
      const same = Buffer.compare(bytes.subarray(from, to), before.subarray(from, to)) === 0;
      must(same, `block ${block} is not the request's but was written`);
    }
  }
}

async function outOfCache(
  rig: Rig,
  producer: TransferEngine,
  sendType: 'PUT' | 'GET',
  peer: PythonPeer,
  form: WireForm,
  { layout, tokens, blocks }: Family,
): Promise<string> {
  const bytes = seededBytes([layerBytes(layout)], 'uint8', 7);
  const layer = { memory: rig.upload(bytes, 'cache'), layout };
  // Past the last token a block holds junk, so only full blocks are sent here.
  const there = form.blockSize === 1 ? tokens : blocks.length * layout.blockSize;
  const expected = sha256(tensorOfCache({ bytes, layout, blocks }, form, there));
  const shape = formShape(form, layout);
  const id = `cmpl-${sendType}-${producer.address.port}-${form.family}-0`;
  const { sent } = producer.send({
    tensorId: `${id}#l` as TensorId,
    shape: wireShape(layout, blocks.length),
    dtype: layout.dtype,
    source: { kind: 'blocks', layer, blockIds: Int32Array.from(blocks) },
    numTokens: there,
    ...(sendType === 'PUT' && { peer: peer.address }),
  });
  sent.catch(() => {}); // thrown by `await sent`, unless the peer's own error comes first
  if (sendType === 'GET') await sent;
  const asked = { tensor_id: `${id}#l`, peer: formatHostPort(producer.address) };
  const got = await peer.ask(sendType === 'PUT' ? 'received' : 'get', asked);
  await sent;
  must(String(got['shape']) === String(shape), `it came as [${got['shape']}]`);
  must(got['sha256'] === expected, 'the bytes differ from those in the cache');
  producer.finish(id as TransferId);
  return `${there} tokens, ${bytesOf({ shape, dtype: layout.dtype })}`;
}

function describe(form: WireForm, { layout }: Family): string {
  return `${form.family} ${nameOf({ shape: formShape(form, layout), dtype: layout.dtype })}, cache blocks of ${layout.blockSize}`;
}
