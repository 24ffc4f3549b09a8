/** What a listener of ours answers to peers that are not ours, to broken messages, and to none at all. */
import { encode } from '@msgpack/msgpack';
import { describe, expect, it } from 'vitest';
import { deferred } from '../../src/deferred.ts';
import type { MemoryRef } from '../../src/device/device.ts';
import { HostDevice } from '../../src/device/host.ts';
import { hostMemory, hostView } from '../../src/device/memory.ts';
import { formatHostPort, parseHostPort } from '../../src/net/address.ts';
import type { TransferService } from '../../src/transfer/service.ts';
import type { Pair } from '../../src/transport/transport.ts';
import { decodeMessage, encodeAnswer, encodeMessage } from '../../src/wire/codec.ts';
import { type TensorId, type TransferId, tensorIdOf } from '../../src/wire/ids.ts';
import type { Answer, PeerHello, UniqueId } from '../../src/wire/messages.ts';
import { proxiedId } from '../../support/ids.ts';
import { RawListener, RawPeer } from '../support/raw-peer.ts';
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

const put = (id: string, bytes: number, more: object = {}) => ({
  cmd: 'PUT',
  tensor_id: id,
  shape: [bytes],
  dtype: 'uint8',
  ...more,
});

describe('a peer that speaks only vLLM', () => {
  it('is answered 0 and 1 and nothing else', async () => {
    const consumer = await services.make({ kvBufferSize: 4_096, memPoolSize: 0 });
    const peer = services.add(new RawPeer(consumer.address));
    const pair = await peer.pair();
    const data = hostMemory(4_000);
    hostView(data).fill(7);
    const id = proxiedId('v');
    await peer.say(put(`${id}-0123abcd#l`, 4_000));
    await peer.say(put('cmpl-w-0-0123abcd#l', 4_000));
    expect([await peer.answer(1), await peer.answer(2)]).toEqual(['0', '1']);
    await pair.send([data], { tensorId: 'x', timeoutMs: 60_000 });
    const got = await consumer.receive(tensorIdOf(id, 'l'), parseHostPort(peer.self));
    expect(hostView(got.memory).every((byte) => byte === 7)).toBe(true);
    consumer.finish(id);
    expect(leftovers(consumer)).toEqual([]);
    expect(peer.answers).toHaveLength(2);
    expect(count(consumer, 'pd_kv_refused_total')).toBe(1);
  });

  it('without a pair is answered 1, and NEW is sent to it; its data then comes on our pair', async () => {
    const consumer = await services.make();
    const news: Promise<import('../../src/transport/transport.ts').Pair>[] = [];
    const listener = services.add(
      await RawListener.listen((body, _, self) => {
        const message = decodeMessage(body, { maxTensorBytes: 1 });
        if (message.cmd === 'NEW') news.push(self.join(message.unique_id));
      }),
    );
    const peer = services.add(new RawPeer(consumer.address, `127.0.0.1:${listener.address.port}`));
    await peer.say(put('lost#l', 100));
    expect(await peer.answer(1)).toBe('1');
    await until('our NEW', () => news.length === 1);
    const pair = await news[0]!;
    await until('open on both ends', () => consumer.state().pairs.some(({ state }) => state === 'open'));
    await peer.say(put('again#l', 100));
    expect(await peer.answer(2)).toBe('0');
    await pair.send([hostMemory(100)], { tensorId: 'x', timeoutMs: 60_000 });
    await consumer.receive('again#l' as TensorId, listener.address, 60_000);
    expect(count(consumer, 'pd_protocol_errors_total', 'no_pair')).toBe(1);
  });

  it('asks with GET and gets what is there, and ret 1 for what is not, in order', async () => {
    const producer = await services.make({ sendType: 'GET' });
    const id = proxiedId('g');
    const tensor = flat(`${id}#l`, 300);
    await send(producer, tensor).sent;
    const peer = services.add(new RawPeer(producer.address));
    const pair = await peer.pair();
    await peer.say({ cmd: 'GET', tensor_id: 'nowhere#l' });
    await peer.say({ cmd: 'GET', tensor_id: `${id}-0123abcd#l` });
    expect(await peer.answer(1)).toBe(Buffer.from(encode({ ret: 1 })).toString('latin1'));
    expect(await peer.answer(2)).toBe(
      Buffer.from(encode({ ret: 0, shape: [300], dtype: 'uint8' })).toString('latin1'),
    );
    const target = hostMemory(300);
    await pair.receive([target], { tensorId: 'x', timeoutMs: 60_000 });
    expect(Buffer.compare(hostView(target), hostView(tensor.data))).toBe(0);
    // Not ours: it may ask again.
    expect(producer.state().tensors).toBe(1);
  });
});

/** Page-locked memory is given out when the test says so. */
class SlowDevice extends HostDevice {
  readonly gate = deferred<void>();
  asked = 0;
  override async allocatePinned(bytes: number, what: string): Promise<MemoryRef> {
    this.asked++;
    await this.gate.promise;
    return super.allocatePinned(bytes, what);
  }
}

describe('a pair that a peer of vLLM gets from us while its message waits for memory', () => {
  /** Its listener, which joins our pair, and its DEALER, with a pair of its own by now. */
  async function meet(engine: TransferService) {
    const joined = deferred<Pair>();
    const listener = services.add(
      await RawListener.listen((body, _, self) => {
        const message = decodeMessage(body, { maxTensorBytes: 1_000 });
        if (message.cmd === 'NEW') void self.join(message.unique_id).then(joined.resolve, joined.reject);
      }),
    );
    const peer = services.add(new RawPeer(engine.address, formatHostPort(listener.address)));
    await peer.pair();
    const ours = async () => {
      const pair = await joined.promise;
      const open = () => engine.state().pairs.filter(({ state }) => state === 'open').length === 2;
      await until('both are open', open);
      return pair;
    };
    return { listener, peer, ours };
  }

  it('carries what it then sends', async () => {
    const device = new SlowDevice();
    const consumer = await services.make({ kvBufferSize: 64 }, { device });
    const { listener, peer, ours } = await meet(consumer);
    await peer.say(put('cmpl-v-0#l', 100));
    await until('memory is asked for', () => device.asked > 0);
    send(consumer, flat('to-them#l', 10, listener.address));
    const pair = await ours();
    device.gate.resolve();
    expect(await peer.answer(1)).toBe('0');
    await pair.send([hostMemory(100)], { tensorId: 'x', timeoutMs: 60_000 });
    await consumer.receive('cmpl-v-0#l' as TensorId, listener.address);
  });

  it('carries what it asked for', async () => {
    const device = new SlowDevice();
    const [{ target } = { target: undefined }] = pagedCache(1, true);
    const block = 2 * LAYOUT.blockSize * LAYOUT.heads * LAYOUT.headDim * 4;
    // Room for what is kept, and none for the form in which such a peer gets it. Not so full that the pool grows before it is asked.
    const kvBufferSize = 3 * block - 64;
    const producer = await services.make(
      { sendType: 'GET', wireLayout: 'blocks-first', kvBufferSize },
      { device },
    );
    await sendCache(producer, 'cmpl-w-0', [{ name: 'l', target: target! }], [3, 5])[0]!.sent;
    const { listener, peer, ours } = await meet(producer);
    await peer.say({ cmd: 'GET', tensor_id: 'cmpl-w-0#l' });
    await until('memory is asked for', () => device.asked > 0);
    void failure(producer.receive('from-them#l' as TensorId, listener.address));
    const pair = await ours();
    device.gate.resolve();
    expect(await peer.answer(1)).toBe(
      Buffer.from(encode({ ret: 0, shape: [2, 2, 4, 2, 8], dtype: 'float32' })).toString('latin1'),
    );
    const got = hostMemory(2 * block);
    await pair.receive([got], { tensorId: 'x', timeoutMs: 60_000 });
    expect(Buffer.concat([3, 5].map((at) => blockOf(target!, at))).equals(Buffer.from(hostView(got)))).toBe(
      true,
    );
  });
});

describe('broken messages', () => {
  it('are counted, answered where they can be, and hurt nobody', async () => {
    const consumer = await services.make({ limits: { maxTensorBytes: 1_000 } });
    const peer = services.add(new RawPeer(consumer.address));
    const pair = await peer.pair();
    await peer.say(Buffer.from('not msgpack'));
    await peer.say(Buffer.alloc(10_000, 0x91));
    await peer.say(Buffer.alloc(0));
    await peer.say({ cmd: 'DANCE' });
    await peer.say({ cmd: 7 });
    await peer.say({ cmd: 'NEW', unique_id: new Uint8Array(5) });
    await peer.socket.send(['two', 'frames']);
    const bad = [
      put('a#l', -1),
      put('a#l', 1.5),
      put('a#l', 1_001),
      put('a#l', 2 ** 53),
      put('a#l', 4, { dtype: 'float13' }),
      put('a#l', 4, { shape: 'wide' }),
      put('', 4),
      put('noHash', 4),
    ];
    for (const message of bad) await peer.say(message);
    expect(await peer.answer(bad.length)).toBe('1');
    expect(peer.answers.map(String)).toEqual(bad.map(() => '1'));
    expect(leftovers(consumer)).toEqual([]);
    await peer.say(put('good#l', 10));
    expect(await peer.answer(bad.length + 1)).toBe('0');
    await pair.send([hostMemory(10)], { tensorId: 'x', timeoutMs: 60_000 });
    await consumer.receive('good#l' as TensorId, parseHostPort(peer.self), 60_000);
    for (const kind of ['malformed', 'unknown_command', 'bad_field', 'limit', 'unknown_dtype'] as const) {
      expect([kind, count(consumer, 'pd_protocol_errors_total', kind)]).not.toEqual([kind, 0]);
    }
  });

  it('an announcement that cannot be read is answered by what it begins with, and nothing else is', async () => {
    const consumer = await services.make();
    const peer = services.add(new RawPeer(consumer.address));
    const whole = encode(put('a#l', 10));
    const ignored = [
      { note: { cmd: 'PUT' } },
      { cmd: 'NEW', unique_id: new Uint8Array(5), note: { cmd: 'GET' } },
      { cmd: 'PUTS', seq: 1 },
    ];
    for (const message of ignored) await peer.say(message);
    // An id of more bytes than are decoded, as a client can make a vLLM producer announce; a message cut off.
    await peer.say(put(`${'x'.repeat(20_000)}#l`, 10));
    await peer.say(whole.subarray(0, whole.length - 1));
    expect([await peer.answer(1), await peer.answer(2)]).toEqual(['1', '1']);
    expect(count(consumer, 'pd_protocol_errors_total', 'limit')).toBe(1);
    await peer.pair();
    await peer.say(put('good#l', 10));
    expect(await peer.answer(3)).toBe('0');
  });

  it('a GET that cannot be taken is answered in its turn', async () => {
    const producer = await services.make({ sendType: 'GET' });
    const peer = services.add(new RawPeer(producer.address));
    await peer.pair();
    await send(producer, flat('here#l', 10)).sent;
    const asked = ['here#l', 1, 'nowhere#l'];
    for (const tensor_id of asked) await peer.say({ cmd: 'GET', tensor_id });
    await peer.answer(asked.length);
    const answers: Answer[] = [
      { kind: 'get', ret: 0, shape: [10], dtype: 'uint8' },
      { kind: 'get', ret: 1 },
      { kind: 'get', ret: 1 },
    ];
    expect(peer.answers).toEqual(answers.map((answer) => Buffer.from(encodeAnswer(answer))));
  });

  it('a duplicate tensor is refused and takes no memory', async () => {
    const consumer = await services.make();
    const peer = services.add(new RawPeer(consumer.address));
    const pair = await peer.pair();
    await peer.say(put('d#l', 10));
    await peer.say(put('d#l', 10));
    expect([await peer.answer(1), await peer.answer(2)]).toEqual(['0', '1']);
    await pair.send([hostMemory(10)], { tensorId: 'x', timeoutMs: 60_000 });
    await consumer.receive('d#l' as TensorId, parseHostPort(peer.self), 60_000);
    expect(consumer.state().buffer.usedBytes).toBe(10);
    expect(count(consumer, 'pd_protocol_errors_total', 'duplicate')).toBe(1);
  });

  it('a second NEW ends the pair of before and opens a new one', async () => {
    const consumer = await services.make();
    const peer = services.add(new RawPeer(consumer.address));
    const first = await peer.pair();
    await peer.say(put('one#l', 10));
    expect(await peer.answer(1)).toBe('0');
    const second = await peer.pair();
    expect((await first.over).code).toBe('PEER_LOST');
    await until('the memory of the first', () => leftovers(consumer).length === 0);
    await peer.say(put('two#l', 10));
    expect(await peer.answer(2)).toBe('0');
    await second.send([hostMemory(10)], { tensorId: 'x', timeoutMs: 60_000 });
    await consumer.receive('two#l' as TensorId, parseHostPort(peer.self), 60_000);
  });

  it('a PUT to an engine of send_type GET is refused, and a GET to one of PUT', async () => {
    const getter = await services.make({ sendType: 'GET' });
    const putter = await services.make();
    const toGetter = services.add(new RawPeer(getter.address));
    const toPutter = services.add(new RawPeer(putter.address));
    await Promise.all([toGetter.pair(), toPutter.pair()]);
    await toGetter.say(put('a#l', 10));
    await toPutter.say({ cmd: 'GET', tensor_id: 'a#l' });
    expect(await toGetter.answer(1)).toBe('1');
    expect(await toPutter.answer(1)).toBe(Buffer.from(encode({ ret: 1 })).toString('latin1'));
    for (const one of [getter, putter]) expect(count(one, 'pd_protocol_errors_total', 'send_type')).toBe(1);
  });
});

describe('between ours', () => {
  it('a PUT without a pair is answered 2, never 0', async () => {
    const consumer = await services.make();
    const peer = services.add(new RawPeer(consumer.address));
    await peer.say(
      encodeMessage({ cmd: 'PUT', tensor_id: 'a#l' as TensorId, shape: [4], dtype: 'uint8', native: {} }),
    );
    expect(await peer.answer(1)).toBe('2');
    expect(leftovers(consumer)).toEqual([]);
  });
});

describe('a routing id', () => {
  it('that a newcomer announces is the newcomer’s: who had it before loses its pair, and is served again after a NEW', async () => {
    const consumer = await services.make();
    const first = services.add(new RawPeer(consumer.address, '127.0.0.1:2'));
    const before = await first.pair();
    await first.say(put('a#l', 10));
    expect(await first.answer(1)).toBe('0');
    const second = services.add(new RawPeer(consumer.address, '127.0.0.1:2'));
    const pair = await second.pair();
    expect((await before.over).code).toBe('PEER_LOST');
    await second.say(put('b#l', 10));
    expect(await second.answer(1)).toBe('0');
    await pair.send([hostMemory(10)], { tensorId: 'b#l', timeoutMs: 60_000 });
    await consumer.receive('b#l' as TensorId, parseHostPort(second.self), 60_000);
    // No answer of the first was given to the second.
    expect(first.answers).toHaveLength(1);
    expect(second.answers).toHaveLength(1);
    consumer.finish('b' as TransferId);
    await until('nothing is held', () => leftovers(consumer).length === 0);
  });
});

/** Joins our pair and takes the tensors of 'a' and 'b', for as long as the test lasts. */
async function receiveBoth(listener: RawListener, uniqueId: UniqueId): Promise<void> {
  try {
    const pair = await listener.join(uniqueId);
    for (const tensorId of ['a#l', 'b#l'])
      await pair.receive([hostMemory(10)], { tensorId, timeoutMs: 60_000 });
  } catch {
    // the test has ended
  }
}

describe('a listener that', () => {
  it('never joins the pair costs a deadline once, and then fails fast', async () => {
    const silent = services.add(await RawListener.listen(() => {}));
    const producer = await services.make({ timeouts: { pairInit: 100 } });
    const error = await failure(send(producer, flat('a#l', 10, silent.address)).sent);
    expect(error.code).toBe('PAIR_INIT_TIMEOUT');
    const again = await failure(send(producer, flat('b#l', 10, silent.address)).sent);
    expect(again.code).toBe('PAIR_INIT_TIMEOUT');
    await until('its NEW', () => silent.messages.length > 0);
    expect(silent.messages).toHaveLength(1);
  });

  it('joins and never answers fails with PEER_ANSWER_TIMEOUT', async () => {
    const silent = services.add(
      await RawListener.listen((body, _, self) => {
        const message = decodeMessage(body, { maxTensorBytes: 1_000 });
        if (message.cmd === 'NEW') void self.join(message.unique_id).catch(() => undefined);
      }),
    );
    const producer = await services.make({ timeouts: { answer: 100 } });
    const error = await failure(send(producer, flat('a#l', 10, silent.address)).sent);
    expect(error.code).toBe('PEER_ANSWER_TIMEOUT');
    expect(error.message).toContain('a#l');
    expect(count(producer, 'pd_protocol_errors_total', 'timeout')).toBe(1);
  });

  it('answers with garbage fails, and so does one that answers out of place', async () => {
    for (const answer of ['\xff\xff', Buffer.from(encode({ ret: 1 }))]) {
      const odd = services.add(
        await RawListener.listen((body, reply, self) => {
          const message = decodeMessage(body, { maxTensorBytes: 1_000 });
          if (message.cmd === 'NEW') void self.join(message.unique_id).catch(() => undefined);
          else reply(answer);
        }),
      );
      const producer = await services.make();
      const error = await failure(send(producer, flat('a#l', 10, odd.address)).sent);
      expect(error.code).toBe('MESSAGE_INVALID');
      expect(leftovers(producer)).toEqual([]);
    }
  });

  it('answers a link before, after its DEALER has given up its name to the next, harms nobody', async () => {
    const late = services.add(
      await RawListener.listen((body, reply, self) => {
        const message = decodeMessage(body, { maxTensorBytes: 1_000 });
        if (message.cmd !== 'NEW') return reply('0');
        reply(encodeAnswer({ kind: 'no-pair' }));
        reply('0');
        void self
          .join(message.unique_id)
          .then((pair) => pair.receive([hostMemory(10)], { tensorId: 'a#l', timeoutMs: 60_000 }))
          .catch(() => undefined);
      }),
    );
    const producer = await services.make();
    expect(await send(producer, flat('a#l', 10, late.address)).sent).toBe(10);
    expect(late.messages).toHaveLength(2);
  });

  it.each([
    ['says hello to the link before as well', 2],
    ['says hello once', 1],
  ])('is one of ours and %s stays connected, and is known to be ours', async (_, hellos) => {
    const ours = services.add(
      await RawListener.listen((body, reply, self) => {
        const message = decodeMessage(body, { maxTensorBytes: 1_000 });
        if (message.cmd !== 'NEW') return reply('0');
        for (let i = 0; i < hellos; i++) reply(encodeAnswer({ kind: 'hello', hello: message.native! }));
        void receiveBoth(self, message.unique_id);
      }),
    );
    const producer = await services.make();
    for (const id of ['a#l', 'b#l']) expect(await send(producer, flat(id, 10, ours.address)).sent).toBe(10);
    const [fresh, , last] = ours.messages.map((body) => decodeMessage(body, { maxTensorBytes: 1_000 }));
    expect(ours.messages).toHaveLength(3);
    expect([fresh?.cmd, last]).toMatchObject(['NEW', { cmd: 'PUT', native: {} }]);
  });

  it('is one of ours and stalls before its hello is sent what is frozen, then on the same link as to one of ours', async () => {
    let native: PeerHello;
    const stalled = services.add(
      await RawListener.listen((body, reply, self) => {
        const message = decodeMessage(body, { maxTensorBytes: 1_000 });
        if (message.cmd === 'NEW') {
          native = message.native!;
          void receiveBoth(self, message.unique_id);
          return;
        }
        if (message.cmd === 'PUT' && message.tensor_id === 'a#l')
          reply(encodeAnswer({ kind: 'hello', hello: native }));
        reply('0');
      }),
    );
    const producer = await services.make();
    for (const id of ['a#l', 'b#l'])
      expect(await send(producer, flat(id, 10, stalled.address)).sent).toBe(10);
    const [fresh, first, second] = stalled.messages.map((body) =>
      decodeMessage(body, { maxTensorBytes: 1_000 }),
    );
    expect([fresh?.cmd, first?.cmd, second?.cmd]).toEqual(['NEW', 'PUT', 'PUT']);
    expect(first).not.toHaveProperty('native');
    expect(second).toHaveProperty('native');
    expect(producer.state().pairs).toMatchObject([{ native: true }]);
  });

  it('has nothing of a request yet is asked for one tensor at a time, each in its turn', async () => {
    const asked: string[] = [];
    const empty = services.add(
      await RawListener.listen((body, reply, self) => {
        const message = decodeMessage(body, { maxTensorBytes: 1_000 });
        if (message.cmd === 'NEW') void self.join(message.unique_id).catch(() => undefined);
        else {
          asked.push(message.tensor_id.split('.')[2]!);
          reply(encodeAnswer({ kind: 'get', ret: 1 }));
        }
      }),
    );
    const consumer = await services.make({ sendType: 'GET' });
    const load = failure(consumer.load(loadRequest('cmpl-n-0', pagedCache(3, false), [1], empty.address)));
    await until('asked again', () => asked.length >= 9);
    consumer.cancelLoad('cmpl-n-0');
    expect((await load).code).toBe('REQUEST_ABORTED');
    expect(asked.slice(0, 9).join('')).toBe('012012012');
    // an ask may be on its way, whose answer gives back its memory
    await until('all is free', () => leftovers(consumer).length === 0);
  });

  it('is not there fails with PEER_UNREACHABLE within the connect deadline', async () => {
    const address = { host: '127.0.0.1', port: await keptPort() };
    const producer = await services.make({ timeouts: { connect: 150 } });
    const error = await failure(send(producer, flat('a#l', 10, address)).sent);
    expect(error.code).toBe('PEER_UNREACHABLE');
    expect(error.message).toContain(String(address.port));
  });

  it('answers 1 fails that send at once and no other', async () => {
    const consumer = await services.make({ kvBufferSize: 1_024, memPoolSize: 0 });
    const producer = await services.make();
    const [large, small] = [flat('big#l', 2_000, consumer.address), flat('small#l', 500, consumer.address)];
    const sends = [large, small].map((tensor) => send(producer, tensor).sent);
    expect((await failure(sends[0]!)).code).toBe('KV_BUFFER_FULL');
    expect(await sends[1]).toBe(500);
  });
});
