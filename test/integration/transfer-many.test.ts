/** Many tensors at once, between ours: announced one behind the other, and each with a fate of its own. */
import { decode } from '@msgpack/msgpack';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { hostMemory, hostView } from '../../src/device/memory.ts';
import { parseHostPort } from '../../src/net/address.ts';
import type { TransferService } from '../../src/transfer/service.ts';
import { encodeMessage } from '../../src/wire/codec.ts';
import type { TensorId, TransferId } from '../../src/wire/ids.ts';
import { SEND_TYPES, type SendType } from '../../src/wire/messages.ts';
import { RawPeer } from '../support/raw-peer.ts';
import {
  blockOf,
  count,
  failure,
  flat,
  LAYOUT,
  leftovers,
  loadRequest,
  pagedCache,
  send,
  sendCache,
  testServices,
  until,
} from '../support/transfer.ts';
import { WatchedTransport } from '../support/watched-transport.ts';

const services = testServices();

const BLOCK = 2 * LAYOUT.blockSize * LAYOUT.heads * LAYOUT.headDim * 4;

/** One tensor across, so that both ends know each other. */
async function acquaint(producer: TransferService, consumer: TransferService): Promise<void> {
  const tensor = flat('hello#l', 8, consumer.address);
  const got = consumer.receive(tensor.tensorId, producer.address);
  await send(producer, tensor).sent;
  await got;
  consumer.finish('hello' as TransferId);
  producer.finish('hello' as TransferId);
}

async function allFree(...ends: TransferService[]): Promise<void> {
  for (const end of ends) {
    await until(`all free: ${leftovers(end)}`, () => leftovers(end).length === 0);
  }
}

describe.each(SEND_TYPES)('%s', (sendType) => {
  it('announces all layers before the first has moved, and moves each by itself, in order', async () => {
    const wire = new WatchedTransport();
    const producer = await services.make({ sendType }, { wrapTransport: wire.wrap });
    const consumer = await services.make({ sendType });
    await acquaint(producer, consumer);
    wire.sends.length = 0;
    const [source, target] = [pagedCache(32, true), pagedCache(32, false)];
    wire.hold();
    const sends = sendCache(producer, 'r', source, [3, 1, 2], consumer.address);
    if (sendType === 'GET') await Promise.all(sends.map(({ sent }) => sent));
    const loaded = consumer.load(loadRequest('r', target, [7, 8, 9], producer.address));
    await until('all are answered', () => wire.sends.length === 32);
    expect(count(consumer, 'pd_kv_received_bytes_total')).toBe(8);
    wire.release();
    await loaded;
    expect(wire.sends).toEqual(Array.from({ length: 32 }, () => [3 * BLOCK]));
    for (const [i, { target: layer }] of target.entries()) {
      expect(blockOf(layer, 9).equals(blockOf(source[i]!.target, 2))).toBe(true);
    }
    for (const end of [producer, consumer]) end.finish('r' as TransferId);
    await allFree(producer, consumer);
  });

  it('keeps its books whatever sizes come together and however little room there is', async () => {
    const wanted = fc.array(fc.integer({ min: 1, max: 3_000 }), { minLength: 1, maxLength: 40 });
    await fc.assert(
      fc.asyncProperty(wanted, fc.integer({ min: 0, max: 40_000 }), async (sizes, room) => {
        // Room for what is asked for by name alone is not made while the answer waits.
        const kvBufferSize = sendType === 'GET' ? 2 ** 20 : room;
        const memPoolSize = 128 * 1_024;
        const producer = await services.make({ sendType, memPoolSize });
        const consumer = await services.make({ sendType, kvBufferSize, memPoolSize });
        const tensors = sizes.map((bytes, i) => flat(`r${i % 3}#l${i}`, bytes, consumer.address));
        const got = tensors.map(({ tensorId }) => consumer.receive(tensorId, producer.address, 60_000));
        for (const tensor of tensors) send(producer, tensor);
        for (const [i, tensor] of tensors.entries()) {
          expect(Buffer.compare(hostView((await got[i]!).memory), hostView(tensor.data))).toBe(0);
        }
        const { buffer, pool } = consumer.state();
        expect(buffer.usedBytes + pool.usedBytes).toBe(sizes.reduce((sum, bytes) => sum + bytes, 0));
        consumer.finish('r1' as TransferId);
        const left = sizes.filter((_, i) => i % 3 !== 1).reduce((sum, bytes) => sum + bytes, 0);
        const after = consumer.state();
        expect(after.buffer.usedBytes + after.pool.usedBytes).toBe(left);
        for (const id of ['r0', 'r2']) consumer.finish(id as TransferId);
        await allFree(producer, consumer);
        await services.dispose();
      }),
      { numRuns: 10 },
    );
  });
});

describe('of many', () => {
  it('what there is no room for is refused, and the rest arrives', async () => {
    const wire = new WatchedTransport();
    const producer = await services.make({}, { wrapTransport: wire.wrap });
    const consumer = await services.make({ kvBufferSize: 4 * BLOCK, memPoolSize: 0 });
    await acquaint(producer, consumer);
    wire.sends.length = 0;
    const source = pagedCache(6, true);
    const sends = sendCache(producer, 'r', source, [3], consumer.address);
    const outcomes = await Promise.allSettled(sends.map(({ sent }) => sent));
    expect(outcomes.map(({ status }) => status)).toEqual([
      ...Array.from({ length: 4 }, () => 'fulfilled'),
      'rejected',
      'rejected',
    ]);
    expect((await failure(sends[5]!.sent)).code).toBe('KV_BUFFER_FULL');
    expect(wire.sends).toEqual(Array.from({ length: 4 }, () => [BLOCK]));
    await until('arrived', () => count(consumer, 'pd_kv_received_bytes_total') === 8 + 4 * BLOCK);
    consumer.finish('r' as TransferId);
    await allFree(producer, consumer);
  });

  it('a tensor beyond the limits of the peer is refused alone', async () => {
    const producer = await services.make();
    const consumer = await services.make({ limits: { maxTensorBytes: 1_000 } });
    await acquaint(producer, consumer);
    const sends = [500, 2_000, 700].map(
      (bytes, i) => send(producer, flat(`r#l${i}`, bytes, consumer.address)).sent,
    );
    expect(await sends[0]).toBe(500);
    expect((await failure(sends[1]!)).code).toBe('KV_BUFFER_FULL');
    expect(await sends[2]).toBe(700);
    consumer.finish('r' as TransferId);
    await allFree(producer, consumer);
  });

  it('a tensor that is held already is refused alone', async () => {
    const producer = await services.make();
    const consumer = await services.make();
    await acquaint(producer, consumer);
    await send(producer, flat('r#l1', 100, consumer.address)).sent;
    const sends = [0, 1, 2].map((i) => send(producer, flat(`r#l${i}`, 100, consumer.address)).sent);
    expect((await failure(sends[1]!)).code).toBe('KV_BUFFER_FULL');
    expect([await sends[0], await sends[2]]).toEqual([100, 100]);
    expect(count(consumer, 'pd_protocol_errors_total', 'duplicate')).toBe(1);
  });

  it('KV of a request that is over is received, dropped and freed', async () => {
    const producer = await services.make();
    const consumer = await services.make();
    await acquaint(producer, consumer);
    consumer.finish('over' as TransferId);
    const sends = sendCache(producer, 'over', pagedCache(3, true), [1], consumer.address);
    await Promise.all(sends.map(({ sent }) => sent));
    await until('dropped', () => count(consumer, 'pd_kv_late_dropped_total') === 3);
    await allFree(producer, consumer);
  });

  it('KV of a request that ends while it is under way is received, dropped and freed', async () => {
    const wire = new WatchedTransport();
    const producer = await services.make({}, { wrapTransport: wire.wrap });
    const consumer = await services.make();
    await acquaint(producer, consumer);
    wire.hold();
    const sends = sendCache(producer, 'ends', pagedCache(4, true), [1, 2], consumer.address);
    await until('announced', () => consumer.state().tensors === 4);
    expect(consumer.state().buffer.usedBytes).toBe(4 * 2 * BLOCK);
    consumer.finish('ends' as TransferId);
    wire.release();
    await Promise.all(sends.map(({ sent }) => sent));
    await until('dropped', () => count(consumer, 'pd_kv_late_dropped_total') === 4);
    await allFree(producer, consumer);
  });

  it('all that were answered fail when their pair dies, and nothing stays behind', async () => {
    const wire = new WatchedTransport();
    const producer = await services.make({}, { wrapTransport: wire.wrap });
    const consumer = await services.make();
    await acquaint(producer, consumer);
    wire.hold();
    const load = failure(consumer.load(loadRequest('d', pagedCache(4, false), [1], producer.address)));
    wire.sends.length = 0;
    const sends = sendCache(producer, 'd', pagedCache(4, true), [1], consumer.address);
    // What has no answer yet when its pair dies is sent again.
    await until('all are answered', () => wire.sends.length === 4);
    wire.kill();
    for (const { sent } of sends) expect((await failure(sent)).code).toBe('PEER_LOST');
    expect((await load).code).toBe('KV_LOAD_FAILED');
    wire.release();
    await allFree(producer, consumer);
  });
});

describe('asked for', () => {
  it('what is not there yet is asked for again, and what is there comes', async () => {
    const producer = await services.make({ sendType: 'GET', timeouts: { answer: 60 } });
    const consumer = await services.make({ sendType: 'GET' });
    await acquaint(producer, consumer);
    const [source, target] = [pagedCache(4, true), pagedCache(4, false)];
    sendCache(producer, 'r', source.slice(0, 2), [3]);
    const load = consumer.load(loadRequest('r', target, [7], producer.address));
    await until(
      'the first half',
      () => producer.state().tensors === 0 && count(producer, 'pd_kv_sent_bytes_total') > 8,
    );
    sendCache(producer, 'r', source.slice(2), [3]);
    await load;
    expect(blockOf(target[3]!.target, 7).equals(blockOf(source[3]!.target, 3))).toBe(true);
    await allFree(producer, consumer);
  });

  it('a tensor of another size than asked for fails its load and harms no other', async () => {
    const producer = await services.make({ sendType: 'GET' });
    const consumer = await services.make({ sendType: 'GET' });
    await acquaint(producer, consumer);
    const [source, target] = [pagedCache(4, true), pagedCache(4, false)];
    sendCache(producer, 'odd', source.slice(0, 2), [3, 4]);
    sendCache(producer, 'odd', source.slice(2), [3]);
    sendCache(producer, 'even', source, [5]);
    const odd = failure(consumer.load(loadRequest('odd', target, [7], producer.address)));
    const even = consumer.load(loadRequest('even', target, [8], producer.address));
    expect((await odd).code).toBe('KV_SHAPE_MISMATCH');
    await even;
    expect(blockOf(target[1]!.target, 8).equals(blockOf(source[1]!.target, 5))).toBe(true);
    for (const end of [producer, consumer]) end.finish('odd' as TransferId);
    await allFree(producer, consumer);
  });

  it('a load that is given up leaves nothing behind', async () => {
    const wire = new WatchedTransport();
    const producer = await services.make({ sendType: 'GET' }, { wrapTransport: wire.wrap });
    const consumer = await services.make({ sendType: 'GET' });
    await acquaint(producer, consumer);
    const sends = sendCache(producer, 'r', pagedCache(4, true), [3]);
    await Promise.all(sends.map(({ sent }) => sent));
    wire.hold();
    const load = failure(consumer.load(loadRequest('r', pagedCache(4, false), [7], producer.address)));
    await until('answered', () => wire.sends.length > 1);
    consumer.cancelLoad('r');
    expect((await load).code).toBe('REQUEST_ABORTED');
    wire.release();
    await allFree(producer, consumer);
  });
});

describe('a worker of an older version, which knows more of the wire', () => {
  const features = ['seq', 'bundle', 'close'];

  it('is offered none of it, and PUTs as vLLM does', async () => {
    const consumer = await services.make();
    const { peer, pair, hello } = await older(consumer, 'PUT');
    expect(hello).toMatchObject({ features: [] });
    const puts = { head: 'a#l.', tail: '', names: ['0'], forms: [[1, 'uint8', 4]], runs: [1] };
    await peer.say({ cmd: 'PUTS', seq: 1, ...puts });
    await peer.say({ cmd: 'CLOSE' });
    const data = flat('a#l', 10);
    await peer.say({ cmd: 'PUT', tensor_id: 'a#l', shape: [10], dtype: 'uint8', pd: { prompt: 'p' } });
    expect(await peer.answer(2)).toBe('0');
    await pair.send([data.data], { tensorId: 'a#l', timeoutMs: 60_000 });
    const got = await consumer.receive(data.tensorId, parseHostPort(peer.self));
    expect(Buffer.compare(hostView(got.memory), hostView(data.data))).toBe(0);
    expect(count(consumer, 'pd_protocol_errors_total', 'unknown_command')).toBe(2);
  });

  it('GETs with a number, and is answered in order and without', async () => {
    const producer = await services.make({ sendType: 'GET' });
    const { peer, pair } = await older(producer, 'GET');
    const tensor = flat('a#l', 10);
    await send(producer, { ...tensor, promptDigest: 'p' }).sent;
    await peer.say({ cmd: 'GET', tensor_id: 'nowhere#l', pd: { seq: 0 } });
    await peer.say({ cmd: 'GET', tensor_id: 'a#l', pd: { seq: 1 } });
    await peer.answer(3);
    expect(peer.answers.slice(1).map((body) => decode(body))).toEqual([
      { ret: 1 },
      { ret: 0, shape: [10], dtype: 'uint8', pd: { prompt: 'p' } },
    ]);
    const target = hostMemory(10);
    await pair.receive([target], { tensorId: 'a#l', timeoutMs: 60_000 });
    expect(Buffer.compare(hostView(target), hostView(tensor.data))).toBe(0);
    await allFree(producer);
  });

  async function older(engine: TransferService, sendType: SendType) {
    const peer = services.add(new RawPeer(engine.address));
    const transport = await peer.transport();
    const unique_id = transport.createUniqueId();
    const native = { version: 1, features, sendType };
    await peer.say(encodeMessage({ cmd: 'NEW', unique_id, native }));
    const pair = await transport.open({ uniqueId: unique_id, rank: 0, peer: 'engine', timeoutMs: 60_000 });
    await peer.answer(1);
    return { peer, pair, hello: (decode(peer.answers[0]!) as { pd: object }).pd };
  }
});

it('both ends opening at once end in two pairs, one for each direction', async () => {
  const [a, b] = [await services.make(), await services.make()];
  const both = [
    send(a, flat('to-b#l', 1_000, b.address)).sent,
    send(b, flat('to-a#l', 1_000, a.address)).sent,
  ];
  const got = [
    a.receive('to-a#l' as TensorId, b.address, 60_000),
    b.receive('to-b#l' as TensorId, a.address, 60_000),
  ];
  await Promise.all([...both, ...got]);
  for (const end of [a, b]) {
    const directions = end.state().pairs.map(({ direction, state }) => `${direction} ${state}`);
    expect(directions.sort()).toEqual(['incoming open', 'outgoing open']);
  }
});
