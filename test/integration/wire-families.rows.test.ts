/** Tensors of every family and block size, to and from a worker of another make (support/peers): into our cache, and out of it. */
import { afterEach, describe, expect, test } from 'vitest';
import type { PagedLayer } from '../../src/device/device.ts';
import { hostView } from '../../src/device/memory.ts';
import { formShape, type WireForm, type WireLayout, wireShape } from '../../src/kv/families.ts';
import type { PagedLayout } from '../../src/kv/layout.ts';
import { formatHostPort } from '../../src/net/address.ts';
import type { TransferService } from '../../src/transfer/service.ts';
import type { TensorId, TransferId } from '../../src/wire/ids.ts';
import { proxiedId } from '../../support/ids.ts';
import { PythonPeer, pythonWith, seededBytes, sha256 } from '../../support/python-peer.ts';
import { type CachedKv, kvDifferences, tensorOfCache, tokenInCache } from '../../support/wire-kv.ts';
import { rows, withTheOthers } from '../support/rows.ts';
import {
  failure,
  LAYOUT,
  leftovers,
  loadRequest,
  pagedCache,
  Services,
  send,
  until,
} from '../support/transfer.ts';

const python = pythonWith('msgpack');
const always = test.skipIf(withTheOthers);
const services = new Services();
let peer: PythonPeer | undefined;
afterEach(async () => {
  await peer?.dispose();
  peer = undefined;
  await services.dispose();
});

const MLA: PagedLayout = {
  family: 'mla',
  numBlocks: 16,
  blockSize: 4,
  heads: 1,
  headDim: 24,
  dtype: 'bfloat16',
};
const BLOCKS = [5, 3, 9];
const TOKENS = 11;
/** So that nothing is left of the last block. */
const WHOLE = 12;

/** One request's KV in a layer. */
const cached = (layer: PagedLayer, blocks: readonly number[] = BLOCKS): CachedKv => ({
  bytes: hostView(layer.memory),
  layout: layer.layout,
  blocks,
});

const form = (family: WireForm['family'], blocks: number, blockSize: number): WireForm => ({
  family,
  blocks,
  blockSize,
});

type Incoming = readonly [name: string, PagedLayout, WireForm];
const INCOMING: readonly Incoming[] = [
  ['tokens', LAYOUT, form('tokens', TOKENS, 1)],
  ['K/V first', LAYOUT, form('kv-first', 3, 4)],
  ['K/V first, blocks of 16', LAYOUT, form('kv-first', 1, 16)],
  ['K/V first, blocks of 3', LAYOUT, form('kv-first', 4, 3)],
  ['K/V first, more blocks than needed', LAYOUT, form('kv-first', 5, 4)],
  ['blocks first', LAYOUT, form('blocks-first', 3, 4)],
  ['blocks first, blocks of 16', LAYOUT, form('blocks-first', 1, 16)],
  ['blocks first, blocks of 6', LAYOUT, form('blocks-first', 2, 6)],
  ['MLA', MLA, form('mla', 3, 4)],
  ['MLA, blocks of 64', MLA, form('mla', 1, 64)],
  ['MLA tokens', MLA, form('mla-tokens', TOKENS, 1)],
];

describe.skipIf(python === undefined)('a tensor of a peer that is not ours', () => {
  const by = (sendType: 'PUT' | 'GET', incoming: readonly Incoming[]) =>
    incoming.map(([name, ...rest]) => [`${name}, by ${sendType}`, ...rest, sendType] as const);
  /** How KV is laid out does not depend on who asks for it: by GET one of each family. */
  const few = INCOMING.filter(([name]) => !name.includes(','));
  const others = INCOMING.filter((each) => !few.includes(each));
  const cases = rows([...by('PUT', INCOMING), ...by('GET', few)], by('GET', others));
  test.each(cases)('goes into our cache: %s', async (_, layout, wire, sendType) => {
    // Two blocks of 6, blocks first, are nothing else only for who expects them.
    const ambiguous = wire.family === 'blocks-first' && wire.blocks === 2;
    const consumer = await services.make({ sendType, wireLayout: ambiguous ? 'blocks-first' : 'kv-first' });
    peer = await PythonPeer.start({ python: python! });
    const cache = pagedCache(2, true, layout);
    const before = cache.map(({ target }) => hostView(target.memory).slice());
    const [shape, dtype] = [formShape(wire, layout), layout.dtype];
    const id = proxiedId('a');
    for (const [seed, { name }] of cache.entries()) {
      const fields = { tensor_id: `${id}-0123abcd#${name}`, shape, dtype, seed };
      if (sendType === 'PUT') await peer.ask('put', { peer: formatHostPort(consumer.address), ...fields });
      else await peer.ask('keep', { ...fields, tensor_id: `${id}#${name}` });
    }
    const request = {
      ...loadRequest(`${id}-89abcdef`, cache, BLOCKS, peer.address, { skipBlocks: 1 }),
      numTokens: TOKENS,
    };
    await consumer.load(request);
    for (const [seed, { target }] of cache.entries()) {
      const tensor = seededBytes(shape, dtype, seed);
      expect(kvDifferences(cached(target), tensor, wire, layout.blockSize, TOKENS)).toEqual([]);
      // What the local cache had stays.
      for (let token = 0; token < layout.blockSize; token++) {
        const now = tokenInCache(cached(target), 0, token);
        const at = now.byteOffset - hostView(target.memory).byteOffset;
        expect(Buffer.compare(now, before[seed]!.subarray(at, at + now.length))).toBe(0);
      }
    }
    expect(leftovers(consumer)).toEqual([]);
    await peer.quit();
  });

  always('two blocks of either family are what --wire-layout says', async () => {
    for (const wireLayout of ['kv-first', 'blocks-first'] as const) {
      const consumer = await services.make({ sendType: 'PUT', wireLayout });
      peer = await PythonPeer.start({ python: python! });
      const wire = form(wireLayout, 2, 4);
      const cache = pagedCache(1, true);
      const shape = formShape(wire, LAYOUT);
      const fields = { tensor_id: `cmpl-a-0#${cache[0]!.name}`, shape, dtype: LAYOUT.dtype, seed: 5 };
      await peer.ask('put', { peer: formatHostPort(consumer.address), ...fields });
      await consumer.load({
        ...loadRequest('cmpl-a-0', cache, BLOCKS.slice(0, 2), peer.address),
        numTokens: 7,
      });
      const tensor = seededBytes(shape, LAYOUT.dtype, 5);
      expect(kvDifferences(cached(cache[0]!.target), tensor, wire, 0, 7)).toEqual([]);
      await peer.quit();
    }
  });

  always.each<[string, number[], string, RegExp]>([
    [
      'other heads',
      [2, 3, 4, 4, 8],
      'float32',
      /\[2, 3, 4, 4, 8\] float32 does not fit .*\[2, blocks, 4, 2, 8\] float32: it has 4 KV heads, the cache 2/,
    ],
    [
      'another head size',
      [2, 3, 4, 2, 16],
      'float32',
      /\[2, 3, 4, 2, 16\].*16 elements, those of the cache 8/,
    ],
    [
      'another dtype',
      [2, 3, 4, 2, 8],
      'bfloat16',
      /bfloat16 does not fit.*elements are bfloat16, those of the cache float32/,
    ],
    [
      'an FP8 cache',
      [2, 3, 4, 2, 8],
      'uint8',
      /\[2, 3, 4, 2, 8\] uint8 does not fit the KV cache \[2, blocks, 4, 2, 8\] float32/,
    ],
    [
      'MLA',
      [3, 4, 24],
      'float32',
      /\[3, 4, 24\] float32 does not fit the KV cache \[2, blocks, 4, 2, 8\] float32/,
    ],
    ['too few tokens', [2, 2, 4, 2, 8], 'float32', /holds 8 tokens, the prompt has 11/],
  ])('%s: an error that names both shapes, for that request alone', async (_, shape, dtype, message) => {
    const consumer = await services.make({ sendType: 'PUT' });
    peer = await PythonPeer.start({ python: python! });
    const cache = pagedCache(1, true);
    const to = formatHostPort(consumer.address);
    const load = (id: string) =>
      consumer.load({
        ...loadRequest(id, cache, BLOCKS, peer!.address, { timeoutMs: 60_000 }),
        numTokens: TOKENS,
      });
    const put = (id: string, form: readonly number[], type: string) =>
      peer!.ask('put', { peer: to, tensor_id: `${id}#${cache[0]!.name}`, shape: form, dtype: type, seed: 1 });
    const wrong = failure(load('cmpl-wrong-0'));
    const right = load('cmpl-right-0');
    await put('cmpl-wrong-0', shape, dtype);
    const error = await wrong;
    expect(error.code).toBe('KV_SHAPE_MISMATCH');
    expect(error.message).toMatch(message);
    await put('cmpl-right-0', wireShape(LAYOUT, 3), 'float32');
    await right;
    expect(leftovers(consumer)).toEqual([]);
    await peer.quit();
  });

  always('layers of other names: an error that names them, for that request alone', async () => {
    const consumer = await services.make({ sendType: 'PUT' });
    peer = await PythonPeer.start({ python: python! });
    const cache = pagedCache(2, true);
    const fields = {
      peer: formatHostPort(consumer.address),
      shape: wireShape(LAYOUT, 3),
      dtype: 'float32',
      seed: 1,
    };
    const wrong = failure(consumer.load(loadRequest('cmpl-wrong-0', cache, BLOCKS, peer.address)));
    await peer.ask('put', { ...fields, tensor_id: 'cmpl-wrong-0#transformer.h.7' });
    const error = await wrong;
    expect(error.code).toBe('KV_SHAPE_MISMATCH');
    expect(error.message).toMatch(
      /transformer\.h\.7.*no layer of that name.*model\.layers\.0\.self_attn\.attn to model\.layers\.1\.self_attn\.attn/,
    );
    consumer.finish('cmpl-wrong-0' as TransferId);
    const right = consumer.load(loadRequest('cmpl-right-0', cache, BLOCKS, peer.address));
    for (const { name } of cache) await peer.ask('put', { ...fields, tensor_id: `cmpl-right-0#${name}` });
    await right;
    expect(leftovers(consumer)).toEqual([]);
    await peer.quit();
  });
});

const OUTGOING: readonly (readonly [wireLayout: WireLayout, PagedLayout, WireForm, tokens: number])[] = [
  ['tokens', LAYOUT, form('tokens', TOKENS, 1), TOKENS],
  ['kv-first', LAYOUT, form('kv-first', 3, 4), WHOLE],
  ['blocks-first', LAYOUT, form('blocks-first', 3, 4), WHOLE],
  ['tokens', MLA, form('mla-tokens', TOKENS, 1), TOKENS],
  ['blocks-first', MLA, form('mla', 3, 4), WHOLE],
];

function sendBlocks(
  producer: TransferService,
  id: string,
  layer: PagedLayer,
  blocks: readonly number[],
  numTokens: number,
  to?: PythonPeer | TransferService,
) {
  return send(producer, {
    tensorId: id as TensorId,
    shape: wireShape(layer.layout, blocks.length),
    dtype: layer.layout.dtype,
    source: { kind: 'blocks', layer, blockIds: Int32Array.from(blocks) },
    numTokens,
    ...(to && { peer: to.address }),
  });
}

describe.skipIf(python === undefined || withTheOthers)('--wire-layout', () => {
  const cases = OUTGOING.flatMap(([wireLayout, layout, ...rest]) =>
    (['PUT', 'GET'] as const).map(
      (sendType) =>
        [
          `${wireLayout} of a cache ${layout.family}, by ${sendType}`,
          wireLayout,
          layout,
          ...rest,
          sendType,
        ] as const,
    ),
  );
  test.each(cases)(
    '%s is what a peer that is not ours gets',
    async (_, wireLayout, layout, wire, tokens, sendType) => {
      const producer = await services.make({ sendType, wireLayout });
      peer = await PythonPeer.start({ python: python! });
      const [{ target } = { target: undefined }] = pagedCache(1, true, layout);
      const expected = {
        shape: formShape(wire, layout),
        dtype: layout.dtype,
        sha256: sha256(tensorOfCache(cached(target!), wire, tokens)),
      };
      // Twice: also once it is known that the peer is not ours.
      for (const id of ['cmpl-a-0#l', 'cmpl-b-0#l']) {
        const sent = sendBlocks(producer, id, target!, BLOCKS, tokens, sendType === 'PUT' ? peer : undefined);
        await sent.sent;
        const got =
          sendType === 'PUT'
            ? await peer.ask('received', { tensor_id: id })
            : await peer.ask('get', { peer: formatHostPort(producer.address), tensor_id: id });
        expect(got).toMatchObject(expected);
      }
      for (const id of ['cmpl-a-0', 'cmpl-b-0']) producer.finish(id as TransferId);
      await until('all is free', () => leftovers(producer).length === 0);
      await peer.quit();
    },
  );
});

describe.skipIf(withTheOthers)('between ours', () => {
  test.each(['PUT', 'GET'] as const)(
    '--wire-layout changes nothing in %s, two blocks included',
    async (sendType) => {
      for (const wireLayout of ['blocks-first', 'tokens'] as const) {
        const producer = await services.make({ sendType, wireLayout });
        const consumer = await services.make({ sendType });
        const from = pagedCache(3, true);
        // The first goes out before anything is known of the peer.
        for (const [round, blocks] of [
          [5, 3],
          [9, 1],
          [2, 4, 6],
        ].entries()) {
          const to = pagedCache(3, true);
          const id = `cmpl-${round}-0`;
          for (const { name, target } of from) {
            sendBlocks(
              producer,
              `${id}#${name}`,
              target,
              blocks,
              blocks.length * 4 - 1,
              sendType === 'PUT' ? consumer : undefined,
            );
          }
          await consumer.load({
            ...loadRequest(id, to, blocks, producer.address),
            numTokens: blocks.length * 4 - 2,
          });
          for (const [layer, { target }] of to.entries()) {
            for (let token = 0; token < blocks.length * 4 - 2; token++) {
              for (const half of [0, 1]) {
                const [a, b] = [target, from[layer]!.target].map((one) =>
                  tokenInCache(cached(one, blocks), half, token),
                );
                expect(Buffer.compare(a!, b!)).toBe(0);
              }
            }
          }
          consumer.finish(id as TransferId);
          producer.finish(id as TransferId);
        }
        await until('all is free', () => leftovers(producer).length + leftovers(consumer).length === 0);
      }
    },
  );
});
