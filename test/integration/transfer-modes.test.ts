/** Two engines exchange KV in all modes, in-process. */
import { describe, expect, it } from 'vitest';
import { hostView } from '../../src/device/memory.ts';
import type { TransferService } from '../../src/transfer/service.ts';
import { type TensorId, type TransferId, transferIdOf, withoutSuffix } from '../../src/wire/ids.ts';
import { SEND_TYPES } from '../../src/wire/messages.ts';
import { proxiedId } from '../../support/ids.ts';
import {
  blockOf,
  count,
  failure,
  flat,
  leftovers,
  loadRequest,
  pagedCache,
  send,
  sendCache,
  testServices,
  until,
} from '../support/transfer.ts';

type Cache = ReturnType<typeof pagedCache>;

const services = testServices();

describe.each(SEND_TYPES)('%s', (sendType) => {
  it('moves flat tensors', async () => {
    const producer = await services.make({ sendType });
    const consumer = await services.make({ sendType });
    const tensors = Array.from({ length: 20 }, (_, i) =>
      flat(`cmpl-a-0#layer${i}`, 1_000 + i, consumer.address),
    );
    const received = tensors.map((tensor) => consumer.receive(tensor.tensorId, producer.address));
    const sent = tensors.map((tensor) => send(producer, tensor));
    for (const [i, tensor] of tensors.entries()) {
      const got = await received[i]!;
      expect(got).toMatchObject({ tensorId: tensor.tensorId, shape: tensor.shape, dtype: 'uint8' });
      expect(Buffer.compare(hostView(got.memory), hostView(tensor.data))).toBe(0);
      expect(await sent[i]!.sent).toBe(1_000 + i);
    }
    const bytes = tensors.reduce((sum, tensor) => sum + tensor.data.bytes, 0);
    expect(consumer.state().buffer.usedBytes).toBe(bytes);
    expect(count(consumer, 'pd_kv_received_bytes_total')).toBe(bytes);
    consumer.finish('cmpl-a-0' as TransferId);
    await until('all free', () => leftovers(consumer).length + leftovers(producer).length === 0);
  });

  it('takes KV of a request into other blocks, and leaves alone those the consumer has', async () => {
    const producer = await services.make({ sendType });
    const consumer = await services.make({ sendType });
    const source = pagedCache(4, true);
    const target = pagedCache(4, false);
    const loading = consumer.load(
      loadRequest('cmpl-r-0', target, [9, 3, 4], producer.address, { skipBlocks: 1 }),
    );
    const sends = sendCache(producer, 'cmpl-r-0', source, [1, 2, 7], consumer.address);
    const { bytes } = await loading;
    await Promise.all(sends.map(({ gathered }) => gathered));
    expect(bytes).toBe(4 * 3 * 2 * 4 * 2 * 8 * 4);
    for (const [i, { target: layer }] of target.entries()) {
      const from = source[i]!.target;
      expect(blockOf(layer, 3).equals(blockOf(from, 2))).toBe(true);
      expect(blockOf(layer, 4).equals(blockOf(from, 7))).toBe(true);
      expect(blockOf(layer, 9).every((byte) => byte === 0)).toBe(true);
      expect(blockOf(layer, 5).every((byte) => byte === 0)).toBe(true);
    }
    consumer.finish('cmpl-r-0' as TransferId);
    producer.finish('cmpl-r-0' as TransferId, true);
    await until('all free', () => leftovers(consumer).length + leftovers(producer).length === 0);
  });

  it('finds KV by its transfer id whatever the engines call its request, and by no other', async () => {
    const producer = await services.make({ sendType });
    const consumer = await services.make({ sendType });
    const source = pagedCache(2, true);
    const other = pagedCache(2, true);
    for (const id of ['cmpl-s-0', 'order-20261128', proxiedId('s')]) {
      const target = pagedCache(2, false);
      // Under ids that only look like its own with a suffix, before and after.
      sendCache(producer, `${id}-89abcdef`, other, [5, 6], consumer.address);
      sendCache(producer, id, source, [5, 6], consumer.address);
      sendCache(producer, withoutSuffix(id) ?? `${id}-01234567`, other, [5, 6], consumer.address);
      const request = loadRequest('any name', target, [0, 1], producer.address);
      await consumer.load({ ...request, transferId: transferIdOf(id) });
      for (const i of [0, 1])
        expect(blockOf(target[i]!.target, 1).equals(blockOf(source[i]!.target, 6))).toBe(true);
    }
  });

  describe('an id that is given to two prompts one after the other', () => {
    const rome = { promptDigest: 'rome' };
    const paris = { promptDigest: 'paris' };
    type Ends = readonly [TransferService, TransferService];
    const ends = async (): Promise<Ends> => [
      await services.make({ sendType }),
      await services.make({ sendType }),
    ];
    const put = ([producer, consumer]: Ends, { promptDigest }: typeof rome, source = pagedCache(2, true)) =>
      sendCache(producer, 'a', source, [5, 6], consumer.address, promptDigest);
    const expectSame = (target: Cache, source: Cache) => {
      for (const i of [0, 1])
        expect(blockOf(target[i]!.target, 1).equals(blockOf(source[i]!.target, 6))).toBe(true);
    };

    it('brings the second its own KV, once the first is over', async () => {
      const both = await ends();
      const [producer, consumer] = both;
      for (const of of [rome, paris, paris]) {
        const [source, target] = [pagedCache(2, true), pagedCache(2, false)];
        const sent = put(both, of, source);
        const request = loadRequest('a', target, [0, 1], producer.address);
        await consumer.load({ ...request, ...of });
        await Promise.all(sent.map((one) => one.sent));
        expectSame(target, source);
        consumer.finish(request.transferId);
        producer.finish(request.transferId);
      }
    });

    it('brings it also where KV of the first came, and nobody for that', async () => {
      const both = await ends();
      const [producer, consumer] = both;
      const [source, target] = [pagedCache(2, true), pagedCache(2, false)];
      await Promise.all(put(both, rome).map((one) => one.sent));
      const request = loadRequest('a', target, [0, 1], producer.address);
      const loaded = consumer.load({ ...request, ...paris });
      put(both, paris, source);
      await loaded;
      expectSame(target, source);
    });

    it('brings it also where the first was given up, and its KV comes late', async () => {
      const both = await ends();
      const [producer, consumer] = both;
      const [source, target] = [pagedCache(2, true), pagedCache(2, false)];
      const request = loadRequest('a', target, [0, 1], producer.address);
      const first = consumer.load({ ...request, ...rome });
      consumer.cancelLoad('a');
      expect((await failure(first)).code).toBe('REQUEST_ABORTED');
      consumer.finish(request.transferId);
      await Promise.all(put(both, rome).map((one) => one.sent));
      const second = consumer.load({ ...request, ...paris });
      put(both, paris, source);
      await second;
      expectSame(target, source);
    });

    it('brings it also where the first was given up, and KV of the second comes before who wants it', async () => {
      const both = await ends();
      const [producer, consumer] = both;
      const [source, target] = [pagedCache(2, true), pagedCache(2, false)];
      const request = loadRequest('a', target, [0, 1], producer.address);
      const first = consumer.load({ ...request, ...rome });
      consumer.cancelLoad('a');
      expect((await failure(first)).code).toBe('REQUEST_ABORTED');
      consumer.finish(request.transferId);
      await Promise.all(put(both, paris, source).map((one) => one.sent));
      await consumer.load({ ...request, ...paris });
      expectSame(target, source);
    });

    it('names the conflict where only KV of the first comes', async () => {
      const both = await ends();
      const [producer, consumer] = both;
      await Promise.all(put(both, rome).map((one) => one.sent));
      const times = { timeoutMs: 50, prefillWithinMs: 600_000 };
      const request = loadRequest('a', pagedCache(2, false), [0, 1], producer.address, times);
      const failed = failure(consumer.load({ ...request, ...paris }));
      await until('come', () => count(consumer, 'pd_kv_received_bytes_total') > 0);
      consumer.prefilled(request.transferId);
      const error = await failed;
      expect(error).toMatchObject({ code: 'KV_LOAD_TIMEOUT' });
      expect(error.message).toContain('came and was dropped, being KV of another prompt');
    });
  });

  it('works over IPv6', async () => {
    const producer = await services.make({ sendType, host: '::1' });
    const consumer = await services.make({ sendType, host: '::1' });
    const tensor = flat('a#l' as TensorId, 5_000, consumer.address);
    send(producer, tensor);
    const got = await consumer.receive(tensor.tensorId, producer.address, 60_000);
    expect(Buffer.compare(hostView(got.memory), hostView(tensor.data))).toBe(0);
  });

  it('goes both ways at once', async () => {
    const ends = [await services.make({ sendType }), await services.make({ sendType })];
    const work = ends.flatMap((from, side) => {
      const to = ends[1 - side]!;
      return Array.from({ length: 200 }, (_, i) => {
        const tensor = flat(`r${side}-${i}#l`, 2_000, to.address);
        return { tensor, sent: send(from, tensor), got: to.receive(tensor.tensorId, from.address), to };
      });
    });
    for (const { tensor, sent, got, to } of work) {
      expect(Buffer.compare(hostView((await got).memory), hostView(tensor.data))).toBe(0);
      await sent.sent;
      to.finish(tensor.tensorId.split('#')[0] as TransferId);
    }
    for (const end of ends) await until('all free', () => leftovers(end).length === 0);
  });
});
