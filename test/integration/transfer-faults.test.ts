/** Loads that go wrong, requests that end early, peers that die and come back: each a hang or a leak in the engine this one replaces. */
import { describe, expect, it } from 'vitest';
import { deferred } from '../../src/deferred.ts';
import { HostDevice } from '../../src/device/host.ts';
import { hostMemory, hostView } from '../../src/device/memory.ts';
import { PdError } from '../../src/errors.ts';
import type { Pair, Transport } from '../../src/transport/transport.ts';
import type { Fingerprint } from '../../src/wire/fingerprint.ts';
import type { TensorId, TransferId } from '../../src/wire/ids.ts';
import {
  blockOf,
  count,
  failure,
  flat,
  keptPort,
  LAYOUT,
  leftovers,
  loadRequest,
  pagedCache,
  send,
  sendCache,
  testServices,
  until,
} from '../support/transfer.ts';

const services = testServices();

/** Holds back every send of data until told, or ends every pair. */
function valve() {
  const gate = deferred<void>();
  const pairs: Pair[] = [];
  let closed = true;
  let held = 0;
  const wrapTransport = (transport: Transport): Transport => ({
    kind: transport.kind,
    createUniqueId: () => transport.createUniqueId(),
    dispose: () => transport.dispose(),
    open: async (options) => {
      const pair = await transport.open(options);
      pairs.push(pair);
      return new Proxy(pair, {
        get(target, key) {
          if (key === 'send') {
            return async (...args: Parameters<Pair['send']>) => {
              held++;
              if (closed) await Promise.race([gate.promise, target.over]);
              return target.send(...args);
            };
          }
          const value: unknown = Reflect.get(target, key, target);
          return typeof value === 'function' ? value.bind(target) : value;
        },
      });
    },
  });
  return {
    wrapTransport,
    /** Sends that have been asked for so far: each has been announced and answered. */
    get sends() {
      return held;
    },
    open() {
      closed = false;
      gate.resolve();
    },
    kill() {
      for (const pair of pairs) pair.abort(new PdError('PEER_LOST', 'killed by the test'));
    },
  };
}

describe('a load', () => {
  it('that never gets its KV says what it waited for, from whom, and what is there instead', async () => {
    const producer = await services.make();
    const consumer = await services.make();
    const cache = pagedCache(2, true);
    const sends = sendCache(producer, 'cmpl-x-1', cache, [0], consumer.address);
    sends.push(send(producer, flat('cmpl-x-00#model.layers.0.self_attn.attn', 8, consumer.address)));
    const bytes = (await Promise.all(sends.map(({ sent }) => sent))).reduce((sum, more) => sum + more, 0);
    await until('all have come', () => count(consumer, 'pd_kv_received_bytes_total') === bytes);
    const error = await failure(
      consumer.load(loadRequest('cmpl-x-0-0123abcd', cache, [0], producer.address, { timeoutMs: 100 })),
    );
    expect(error.code).toBe('KV_LOAD_TIMEOUT');
    expect(error.message).toContain('cmpl-x-0#model.layers.0.self_attn.attn');
    expect(error.message).toContain('0 of 2 layers');
    expect(error.message).toContain('held instead: cmpl-x-00#model.layers.0.self_attn.attn (ready)');
    expect(error.message).toContain(String(producer.address.port));
  });

  it('of another shape fails alone, and names both shapes', async () => {
    const producer = await services.make();
    const consumer = await services.make();
    const [source, target] = [pagedCache(2, true), pagedCache(2, false)];
    const wrong = failure(consumer.load(loadRequest('w', target, [1, 2], producer.address)));
    const right = consumer.load(loadRequest('r', target, [3], producer.address));
    sendCache(producer, 'w', source, [1], consumer.address);
    sendCache(producer, 'r', source, [1], consumer.address);
    const error = await wrong;
    expect(error.code).toBe('KV_SHAPE_MISMATCH');
    expect(error.message).toContain('[2, 1, 4, 2, 8]');
    expect(error.message).toContain('[2, 2, 4, 2, 8]');
    await right;
    consumer.finish('w' as TransferId);
    await until('all free', () => leftovers(consumer).length === 0);
  });

  it.each(['before', 'after'])(
    'whose tensor was refused for want of room fails at once, started %s it came',
    async (when) => {
      const producer = await services.make();
      const consumer = await services.make({ kvBufferSize: 256, memPoolSize: 0 });
      const cache = pagedCache(2, true);
      const load = () => failure(consumer.load(loadRequest('f', cache, [0, 1], producer.address)));
      const early = when === 'before' ? load() : undefined;
      const sends = sendCache(producer, 'f', cache, [0, 1], consumer.address);
      expect((await failure(sends[0]!.sent)).code).toBe('KV_BUFFER_FULL');
      const error = await (early ?? load());
      expect(error.code).toBe('KV_LOAD_FAILED');
      expect(error.message).toContain('KV_BUFFER_FULL');
    },
  );

  it('that is cancelled writes nothing after its promise has settled', async () => {
    const producer = await services.make();
    const consumer = await services.make();
    const target = pagedCache(2, false);
    const load = failure(consumer.load(loadRequest('c', target, [0], producer.address)));
    consumer.cancelLoad('c');
    expect((await load).code).toBe('REQUEST_ABORTED');
    await Promise.all(
      sendCache(producer, 'c', pagedCache(2, true), [1], consumer.address).map(({ sent }) => sent),
    );
    for (const { target: layer } of target)
      expect(hostView(layer.memory).every((byte) => byte === 0)).toBe(true);
    consumer.finish('c' as TransferId);
    await until('all free', () => leftovers(consumer).length === 0);
  });

  it('fails at once when the pair that was to bring it dies', async () => {
    const held = valve();
    const producer = await services.make({}, { wrapTransport: held.wrapTransport });
    const consumer = await services.make();
    const cache = pagedCache(3, true);
    const load = failure(consumer.load(loadRequest('k', cache, [0], producer.address)));
    const sends = sendCache(producer, 'k', cache, [0], consumer.address);
    // What has no answer yet when its pair dies is sent again.
    await until('all are answered', () => held.sends === sends.length);
    held.kill();
    const error = await load;
    expect(error.code).toBe('KV_LOAD_FAILED');
    expect(error.message).toContain('PEER_LOST');
    for (const { sent } of sends) expect((await failure(sent)).code).toBe('PEER_LOST');
    held.open();
    for (const end of [producer, consumer]) await until('all free', () => leftovers(end).length === 0);
    // Only that pair: the next transfer opens a new one.
    const again = consumer.load(loadRequest('k2', cache, [1], producer.address));
    sendCache(producer, 'k2', cache, [0], consumer.address);
    await again;
  });
});

describe('a request that ends early', () => {
  it('has what still comes received, dropped, freed and counted', async () => {
    const held = valve();
    const producer = await services.make({}, { wrapTransport: held.wrapTransport });
    const consumer = await services.make();
    const first = send(producer, flat('late#l0', 100, consumer.address));
    await until('the answer', () => consumer.state().tensors === 1);
    consumer.finish('late' as TransferId);
    expect(consumer.state().buffer.usedBytes).toBe(100);
    held.open();
    expect(await first.sent).toBe(100);
    expect(await send(producer, flat('late#l1', 100, consumer.address)).sent).toBe(100);
    await until('both dropped', () => count(consumer, 'pd_kv_late_dropped_total') === 2);
    expect(leftovers(consumer)).toEqual([]);
  });

  it('that never comes leaves orphans, which are freed in time and counted', async () => {
    const consumer = await services.make({ timeouts: { orphan: 60 } });
    const producer = await services.make();
    await Promise.all([0, 1, 2].map((i) => send(producer, flat(`o-${i}#l`, 100, consumer.address)).sent));
    await until('orphans', () => count(consumer, 'pd_kv_orphans_freed_total') === 3);
    expect(leftovers(consumer)).toEqual([]);
  });

  it('in GET leaves nothing kept: finished, or never asked for', async () => {
    const producer = await services.make({ sendType: 'GET', timeouts: { orphan: 60 } });
    await send(producer, flat('f#l', 100)).sent;
    producer.finish('f' as TransferId);
    expect(leftovers(producer)).toEqual([]);
    await send(producer, flat('n#l', 100)).sent;
    producer.finish('n' as TransferId, true);
    expect(producer.state().tensors).toBe(1);
    await until('orphan', () => count(producer, 'pd_kv_orphans_freed_total') === 1);
    expect(leftovers(producer)).toEqual([]);
  });
});

describe('room', () => {
  it('goes from buffer to pool to refusal, exactly, and back to zero', async () => {
    const consumer = await services.make({ kvBufferSize: 1_024, memPoolSize: 1_024 });
    const producer = await services.make();
    const tensors = [0, 1, 2].map((i) => flat(`t-${i}#l`, 1_000, consumer.address));
    expect(await send(producer, tensors[0]!).sent).toBe(1_000);
    expect(await send(producer, tensors[1]!).sent).toBe(1_000);
    expect((await failure(send(producer, tensors[2]!).sent)).code).toBe('KV_BUFFER_FULL');
    expect(consumer.state()).toMatchObject({
      buffer: { usedBytes: 1_000, thresholdBytes: 1_024 },
      pool: { usedBytes: 1_000, reservedBytes: 1_024, limitBytes: 1_024 },
    });
    const pooled = await consumer.receive(tensors[1]!.tensorId, producer.address);
    expect(Buffer.compare(hostView(pooled.memory), hostView(tensors[1]!.data))).toBe(0);
    for (const i of [0, 1]) consumer.finish(`t-${i}` as TransferId);
    expect(leftovers(consumer)).toEqual([]);
    expect(count(consumer, 'pd_kv_refused_total')).toBe(1);
  });

  it('in GET is made by evicting the oldest', async () => {
    const producer = await services.make({ sendType: 'GET', kvBufferSize: 2_048, memPoolSize: 0 });
    const consumer = await services.make({ sendType: 'GET' });
    const tensors = [0, 1, 2].map((i) => flat(`e-${i}#l`, 1_000));
    for (const tensor of tensors) await send(producer, tensor).sent;
    expect(count(producer, 'pd_kv_evicted_total')).toBe(1);
    // Told at once: who asks can compute the prompt instead of waiting.
    const evicted = await failure(consumer.receive(tensors[0]!.tensorId, producer.address));
    expect(evicted.code).toBe('KV_LOAD_FAILED');
    expect(evicted.message).toContain('make room');
    for (const tensor of tensors.slice(1)) await consumer.receive(tensor.tensorId, producer.address, 60_000);
    await until('fetched and gone', () => leftovers(producer).length === 0);
    await send(producer, tensors[0]!).sent;
    await consumer.receive(tensors[0]!.tensorId, producer.address, 60_000);
  });

  it('for what never fits is refused at once, and costs nobody else anything', async () => {
    for (const sendType of ['PUT_ASYNC', 'GET'] as const) {
      const producer = await services.make({ sendType, kvBufferSize: 2_048, memPoolSize: 1_024 });
      const consumer = await services.make({ sendType });
      const small = flat(`s-${sendType}#l`, 1_000, consumer.address);
      if (sendType === 'GET') await send(producer, small).sent;
      const blocks = Array.from({ length: 16 }, (_, i) => i);
      const huge = sendCache(producer, `h-${sendType}`, pagedCache(1, true), blocks, consumer.address);
      expect((await failure(huge[0]!.sent)).code).toBe('KV_BUFFER_FULL');
      expect(count(producer, 'pd_kv_evicted_total')).toBe(0);
      if (sendType !== 'GET') send(producer, small);
      await consumer.receive(small.tensorId, producer.address, 60_000);
    }
  });

  it('for gathering is waited for: many sends through a buffer of one', async () => {
    const bytes = 2 * 4 * 2 * 8 * 4;
    const producer = await services.make({ kvBufferSize: bytes, memPoolSize: 0 });
    const consumer = await services.make();
    const cache = pagedCache(12, true);
    const target = pagedCache(12, false);
    const load = consumer.load(loadRequest('p', target, [2], producer.address));
    sendCache(producer, 'p', cache, [5], consumer.address);
    await load;
    for (const [i, { target: layer }] of target.entries()) {
      expect(blockOf(layer, 2).equals(blockOf(cache[i]!.target, 5))).toBe(true);
    }
  });

  it('for gathering that never comes free fails the send', async () => {
    const producer = await services.make({ kvBufferSize: 256, memPoolSize: 0, timeouts: { transfer: 50 } });
    const consumer = await services.make();
    const [only] = sendCache(producer, 'p', pagedCache(1, true), [5], consumer.address);
    const error = await failure(only!.gathered);
    expect(error.code).toBe('KV_BUFFER_FULL');
    await failure(only!.sent);
  });
});

describe('a peer that restarts on its address', () => {
  it('consumer: the next PUT opens a new pair', async () => {
    const producer = await services.make();
    const first = await services.make({ port: await keptPort() });
    await send(producer, flat('a#l', 100, first.address)).sent;
    await first.dispose();
    const second = await services.make({ port: first.address.port });
    expect(await send(producer, flat('b#l', 100, second.address)).sent).toBe(100);
    await second.receive('b#l' as TensorId, producer.address);
  });

  it('producer: the consumer takes its new pair in place of the old', async () => {
    const consumer = await services.make();
    const first = await services.make({ port: await keptPort() });
    await send(first, flat('a#l', 100, consumer.address)).sent;
    await first.dispose();
    const second = await services.make({ port: first.address.port });
    expect(await send(second, flat('b#l', 100, consumer.address)).sent).toBe(100);
    expect(consumer.state().pairs.filter(({ direction }) => direction === 'incoming')).toHaveLength(1);
  });

  it('and has no pair any more answers 2: the sender opens a new one, once', async () => {
    const producer = await services.make();
    const held = valve();
    const consumer = await services.make({}, { wrapTransport: held.wrapTransport });
    await send(producer, flat('a#l', 100, consumer.address)).sent;
    held.kill();
    expect(await send(producer, flat('b#l', 100, consumer.address)).sent).toBe(100);
    await consumer.receive('b#l' as TensorId, producer.address);
  });
});

describe('ends that do not fit', () => {
  const fingerprint = (weights: string): Fingerprint => ({
    digest: weights.repeat(8),
    model: 'demo',
    weights,
    dtype: 'float32',
    blockSize: 4,
    layers: 2,
    heads: 2,
    headDim: 8,
  });

  it('by weights: everything queued fails, and names both', async () => {
    const producer = await services.make({ fingerprint: fingerprint('aaaa') });
    const consumer = await services.make({ fingerprint: fingerprint('bbbb') });
    const sends = [0, 1].map((i) => send(producer, flat(`a-${i}#l`, 10, consumer.address)));
    for (const { sent } of sends) {
      const error = await failure(sent);
      expect(error.code).toBe('FINGERPRINT_MISMATCH');
      expect(error.message).toMatch(/weights bbbb.*weights aaaa/);
    }
    expect(count(consumer, 'pd_protocol_errors_total', 'fingerprint')).toBe(1);
  });

  it('by send type', async () => {
    const producer = await services.make({ sendType: 'PUT' });
    const consumer = await services.make({ sendType: 'GET' });
    const error = await failure(send(producer, flat('a#l', 10, consumer.address)).sent);
    expect(error.code).toBe('SEND_TYPE_MISMATCH');
    expect(error.message).toMatch(/GET.*PUT/);
    const asked = await failure(consumer.receive('a#l' as TensorId, producer.address, 60_000));
    expect(asked.code).toBe('SEND_TYPE_MISMATCH');
  });
});

describe('GET', () => {
  it('for a tensor that is not there yet asks again until it is', async () => {
    const producer = await services.make({ sendType: 'GET' });
    const consumer = await services.make({ sendType: 'GET' });
    const got = consumer.receive('slow#l' as TensorId, producer.address, 60_000);
    await until('asked', () => producer.state().pairs.some(({ state }) => state === 'open'));
    const tensor = flat('slow#l', 100);
    await send(producer, tensor).sent;
    expect(Buffer.compare(hostView((await got).memory), hostView(tensor.data))).toBe(0);
  });

  it('works for an id that was used and finished before', async () => {
    const producer = await services.make({ sendType: 'GET' });
    const consumer = await services.make({ sendType: 'GET' });
    for (const round of [1, 2]) {
      const tensor = flat('again#l', 100 * round);
      await send(producer, tensor).sent;
      const got = await consumer.receive(tensor.tensorId, producer.address, 60_000);
      expect(Buffer.compare(hostView(got.memory), hostView(tensor.data))).toBe(0);
      for (const end of [producer, consumer]) end.finish('again' as TransferId);
    }
    for (const end of [producer, consumer]) await until('all free', () => leftovers(end).length === 0);
  });

  it('whose producer dies fails the load', async () => {
    const producer = await services.make({ sendType: 'GET' });
    const consumer = await services.make({ sendType: 'GET' });
    const load = failure(consumer.load(loadRequest('g', pagedCache(2, false), [0], producer.address)));
    await until('asked', () => consumer.state().pairs.some(({ state }) => state === 'open'));
    await producer.dispose();
    expect((await load).code).toBe('KV_LOAD_FAILED');
    await until('all free', () => leftovers(consumer).length === 0);
  });

  it('that is given up while it waits for memory holds up nothing behind it', async () => {
    const sendType = 'GET';
    const producer = await services.make({ sendType });
    const cache = pagedCache(2, true);
    const consumer = await services.make({ sendType, kvBufferSize: 2_048, memPoolSize: 0 });
    const blocker = flat('b#l', 2_000);
    await send(producer, blocker).sent;
    for (const id of ['c', 'd']) {
      await Promise.all(sendCache(producer, id, cache, [1, 2]).map(({ sent }) => sent));
    }
    await consumer.receive(blocker.tensorId, producer.address);
    const givenUp = consumer.load(loadRequest('c', pagedCache(2, false), [1, 2], producer.address));
    const [refused] = [failure(givenUp), consumer.cancelLoad('c')];
    expect((await refused).code).toBe('REQUEST_ABORTED');
    const outOfTime = { timeoutMs: 50 };
    const late = consumer.load(loadRequest('c', pagedCache(2, false), [1, 2], producer.address, outOfTime));
    expect((await failure(late)).code).toMatch(/^KV_LOAD_/);
    consumer.finish('b' as TransferId);
    await consumer.load(
      loadRequest('d', pagedCache(2, false), [1, 2], producer.address, { timeoutMs: 60_000 }),
    );
    expect(consumer.state().pairs[0]?.queued).toBe(0);
    await until('all free', () => leftovers(consumer).length === 0);
  });

  it('that is cancelled leaves nothing behind', async () => {
    const producer = await services.make({ sendType: 'GET' });
    const consumer = await services.make({ sendType: 'GET' });
    const load = failure(consumer.load(loadRequest('g', pagedCache(2, false), [0], producer.address)));
    await until('asked', () => consumer.state().pairs.some(({ state }) => state === 'open'));
    consumer.cancelLoad('g');
    expect((await load).code).toBe('REQUEST_ABORTED');
    await until('all free', () => leftovers(consumer).length === 0);
    await Promise.all(sendCache(producer, 'g', pagedCache(2, true), [0]).map(({ sent }) => sent));
    producer.finish('g' as TransferId);
    expect(leftovers(producer)).toEqual([]);
  });
});

it('waits for the event of the source before it gathers', async () => {
  class LateDevice extends HostDevice {
    fired = false;
    readonly waited: number[] = [];
    override createStream() {
      const stream = super.createStream();
      return {
        ...stream,
        wait: () => {
          this.waited.push(1);
        },
        record: () => ({ ref: { kind: 'host' } as const, done: () => this.fired, dispose: () => {} }),
      };
    }
  }
  const device = new LateDevice();
  const producer = await services.make({}, { device });
  const consumer = await services.make();
  const source = hostMemory(2 * LAYOUT.blockSize * LAYOUT.heads * LAYOUT.headDim * 4 * LAYOUT.numBlocks);
  const sent = send(producer, {
    tensorId: 'e#l' as TensorId,
    shape: [2, 1, LAYOUT.blockSize, LAYOUT.heads, LAYOUT.headDim],
    dtype: 'float32',
    source: { kind: 'blocks', layer: { memory: source, layout: LAYOUT }, blockIds: Int32Array.of(0) },
    ready: { kind: 'host' },
    peer: consumer.address,
  });
  await until('the pair', () => producer.state().pairs.some(({ state }) => state === 'open'));
  expect(device.waited).toHaveLength(1);
  expect(consumer.state().tensors).toBe(0);
  expect(producer.state().pairs[0]).toMatchObject({ queued: 1, outstanding: 0 });
  device.fired = true;
  await sent.sent;
  await consumer.receive('e#l' as TensorId, producer.address);
});
