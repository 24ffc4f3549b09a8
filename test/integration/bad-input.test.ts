/** What broken, hostile and too many messages do to a live listener: nothing that its other peers would notice. */
import { encode } from '@msgpack/msgpack';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { Dealer } from 'zeromq';
import { hostMemory } from '../../src/device/memory.ts';
import { formatHostPort, parseHostPort } from '../../src/net/address.ts';
import { METRICS } from '../../src/observability/metrics.ts';
import type { TransferService } from '../../src/transfer/service.ts';
import { HostTransport } from '../../src/transport/host/transport.ts';
import { encodeMessage, encodePing } from '../../src/wire/codec.ts';
import type { TensorId, TransferId } from '../../src/wire/ids.ts';
import { startQuietProxy } from '../support/quiet-proxy.ts';
import { RawPeer } from '../support/raw-peer.ts';
import { count, leftovers, testServices, until } from '../support/transfer.ts';

const services = testServices();

const MIB = 2 ** 20;
/** Of whatever a test makes itself, too: loose, but far below what one message could cost. */
const MOST_GROWTH = 400 * MIB;
const MUTATIONS = 1_000;

const id = (name: string) => name as TensorId;
const shape = [2, 3, 4, 2, 8];

async function validMessages(): Promise<Record<string, Uint8Array>> {
  const transport = services.add(
    await HostTransport.create({ bindHost: '127.0.0.1', announceHost: '127.0.0.1' }),
  );
  const unique_id = transport.createUniqueId();
  const hello = { version: 1, features: ['layout:blocks-first'], sendType: 'PUT' } as const;
  const tensor_id = id('cmpl-a-0#l.0');
  return {
    NEW: encodeMessage({ cmd: 'NEW', unique_id }),
    'NEW of ours': encodeMessage({ cmd: 'NEW', unique_id, native: hello }),
    PUT: encodeMessage({ cmd: 'PUT', tensor_id, shape, dtype: 'float16' }),
    'PUT of ours': encodeMessage({ cmd: 'PUT', tensor_id, shape, dtype: 'float16', native: {} }),
    GET: encodeMessage({ cmd: 'GET', tensor_id }),
  };
}

/** A few bytes changed, taken out, put in, doubled, or the end cut off. */
function mutated(valid: Uint8Array): Uint8Array[] {
  const change = fc.record({
    at: fc.nat({ max: valid.length - 1 }),
    kind: fc.constantFrom('set', 'insert', 'remove', 'cut', 'double'),
    bytes: fc.uint8Array({ minLength: 1, maxLength: 4 }),
  });
  const messages = fc.array(change, { minLength: 1, maxLength: 4 }).map((changes) => {
    let bytes = Buffer.from(valid);
    for (const { at, kind, bytes: more } of changes) {
      const [head, tail] = [bytes.subarray(0, at), bytes.subarray(at)];
      if (kind === 'set') bytes = Buffer.concat([head, more, tail.subarray(more.length)]);
      else if (kind === 'insert') bytes = Buffer.concat([head, more, tail]);
      else if (kind === 'remove') bytes = Buffer.concat([head, tail.subarray(more.length)]);
      else if (kind === 'cut') bytes = Buffer.from(head);
      else bytes = Buffer.concat([bytes, tail]);
    }
    return new Uint8Array(bytes);
  });
  return fc.sample(messages, { numRuns: MUTATIONS, seed: 20_261 });
}

/** The listener serves a peer that does everything right. Its deadlines are short here: a busy machine may need several tries. */
async function serves(engine: TransferService): Promise<void> {
  for (const end = performance.now() + 60_000; ; ) {
    const peer = services.add(new RawPeer(engine.address, '127.0.0.1:99'));
    const pair = await peer.pair(SHORT.pairInit).catch(() => undefined);
    await peer.say({ cmd: 'PUT', tensor_id: 'good#l', shape: [10], dtype: 'uint8' });
    const answer = await peer.answer(1);
    if (pair && answer === '0') {
      await pair.send([hostMemory(10)], { tensorId: 'good#l', timeoutMs: 60_000 });
      await engine.receive(id('good#l'), parseHostPort(peer.self), 60_000);
      engine.finish('good' as TransferId);
      return peer.dispose();
    }
    await peer.dispose();
    expect(performance.now(), `the last was answered ${answer}`).toBeLessThan(end);
  }
}

function protocolErrors(engine: TransferService): number {
  const kinds = METRICS.pd_protocol_errors_total.values;
  return kinds.reduce((sum, kind) => sum + count(engine, 'pd_protocol_errors_total', kind), 0);
}

async function growth(run: () => Promise<void>): Promise<number> {
  const before = process.memoryUsage().rss;
  await run();
  return process.memoryUsage().rss - before;
}

const SHORT = { pairInit: 300, connect: 300, answer: 300 };

describe('a thousand mutated messages of each kind', () => {
  test.each(['PUT', 'GET'] as const)(
    'do nothing to a listener of send_type %s that others would notice',
    async (sendType) => {
      const engine = await services.make({ sendType, timeouts: SHORT, limits: { maxTensorBytes: MIB } });
      const kinds = Object.entries(await validMessages());
      const grown = await growth(async () => {
        for (const [kind, valid] of kinds) {
          const peer = new RawPeer(
            engine.address,
            `127.0.0.1:${1 + kinds.findIndex(([name]) => name === kind)}`,
          );
          for (const body of mutated(valid)) await peer.say(body);
          // Answers keep their order, so that all before it have been looked at.
          await peer.say(encode({ cmd: 'PUT', tensor_id: 'last#l', shape: [2 ** 40], dtype: 'uint8' }));
          await until(`the last after ${kind}`, () => peer.answers.at(-1)?.toString() === '1');
          await peer.dispose();
        }
      });
      expect(grown).toBeLessThan(MOST_GROWTH);
      expect(protocolErrors(engine)).toBeGreaterThan(kinds.length * MUTATIONS * 0.3);
      if (sendType === 'PUT') await serves(engine);
      await until('nothing is held', () => leftovers(engine).length === 0);
    },
  );

  test('nor pings to a proxy', async () => {
    const proxy = await startQuietProxy();
    services.add({ dispose: () => proxy.close(0) });
    const good = { type: 'P', http_address: '127.0.0.1:1', zmq_address: '127.0.0.1:2' } as const;
    const native = { version: 1, digest: 'd'.repeat(64), model: 'm' };
    const dealer = new Dealer({ linger: 0, routingId: 'fuzz' });
    dealer.connect(`tcp://${formatHostPort(proxy.discoveryAddress)}`);
    for (const body of [...mutated(encodePing(good)), ...mutated(encodePing({ ...good, native }))])
      await dealer.send(body);
    await dealer.send(encodePing({ ...good, http_address: '127.0.0.1:9' }));
    await until('the good one', () =>
      proxy.instances.some(({ httpAddress }) => httpAddress === '127.0.0.1:9'),
    );
    dealer.close();
  });
});

describe('inputs that eat memory', () => {
  test('nested arrays and arrays without end are refused unread', async () => {
    const engine = await services.make({ timeouts: SHORT });
    const peer = services.add(new RawPeer(engine.address));
    // 250 bytes of array headers, each of 2^32 - 1 elements; as many as a message may have of arrays of one; of maps.
    const huge = Buffer.concat(Array.from({ length: 50 }, () => Buffer.from([0xdd, 0xff, 0xff, 0xff, 0xff])));
    const bodies = [huge, Buffer.alloc(60_000, 0x91), Buffer.alloc(60_000, 0x81), Buffer.alloc(60_000, 0xdf)];
    const grown = await growth(async () => {
      for (let round = 0; round < 100; round++) for (const body of bodies) await peer.say(body);
      const refused = () =>
        count(engine, 'pd_protocol_errors_total', 'limit') +
        count(engine, 'pd_protocol_errors_total', 'malformed');
      await until('all are refused', () => refused() === 400);
    });
    expect(grown).toBeLessThan(MOST_GROWTH);
    await serves(engine);
  });

  test('ten megabytes of 0x91 end the connection that sends them', async () => {
    const engine = await services.make({ timeouts: SHORT });
    const dealer = new Dealer({ linger: 0, routingId: 'fat', reconnectInterval: -1 });
    services.add({ dispose: async () => dealer.close() });
    const lost = new Promise<void>((resolve) => dealer.events.on('disconnect', () => resolve()));
    const grown = await growth(async () => {
      dealer.connect(`tcp://${formatHostPort(engine.address)}`);
      await dealer.send(Buffer.alloc(10_000_000, 0x91));
      await lost;
    });
    expect(grown).toBeLessThan(MOST_GROWTH);
    await serves(engine);
  });
});

describe('too many', () => {
  test('announcements of one peer, beyond the high-water mark, with nobody reading the answers', async () => {
    const engine = await services.make({ timeouts: SHORT, limits: { maxQueuePerPeer: 64 } });
    const flood = new Dealer({ linger: 0, routingId: '127.0.0.1:3', sendHighWaterMark: 0 });
    services.add({ dispose: async () => flood.close() });
    flood.connect(`tcp://${formatHostPort(engine.address)}`);
    const put = Buffer.from(encode({ cmd: 'PUT', tensor_id: 'flood#l', shape: [MIB], dtype: 'uint8' }));
    const grown = await growth(async () => {
      for (let sent = 0; sent < 40_000; sent++) await flood.send(put);
      await serves(engine);
    });
    expect(grown).toBeLessThan(MOST_GROWTH);
    expect(leftovers(engine)).toEqual([]);
  });

  test('NEWs: no more than so many pairs are being opened, and others are served', async () => {
    const engine = await services.make({ timeouts: { ...SHORT, pairInit: 60_000 } });
    // Rank 0 never wants them: the listener's connections wait for an answer to their handshake.
    const transport = services.add(
      await HostTransport.create({ bindHost: '127.0.0.1', announceHost: '127.0.0.1' }),
    );
    const peer = services.add(new RawPeer(engine.address));
    for (let sent = 0; sent < 1_000; sent++) {
      await peer.say(encodeMessage({ cmd: 'NEW', unique_id: transport.createUniqueId() }));
    }
    await until('some are refused', () => count(engine, 'pd_protocol_errors_total', 'limit') > 0);
    await transport.dispose();
    await until('the rest is over', () => engine.state().pairs.length === 0);
    await serves(engine);
  });
});
