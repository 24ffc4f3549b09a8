/** Our engine beside a worker of another make (support/peers, Python, from docs/protocol.md) on the host transport. */
import { networkInterfaces } from 'node:os';
import { afterEach, describe, expect, test } from 'vitest';
import * as zmq from 'zeromq';
import { DEFAULT_LIMITS } from '../../src/config/transfer-options.ts';
import { deferred } from '../../src/deferred.ts';
import { hostMemory, hostView } from '../../src/device/memory.ts';
import { PdError } from '../../src/errors.ts';
import { formatHostPort, type HostPort } from '../../src/net/address.ts';
import { createLogger } from '../../src/observability/log.ts';
import { Discovery } from '../../src/proxy/discovery.ts';
import { InstanceRegistry, type RegistryChange } from '../../src/proxy/registry.ts';
import type { SendRequest } from '../../src/transfer/types.ts';
import { HostTransport } from '../../src/transport/host/transport.ts';
import { decodeMessage, encodeAnswer } from '../../src/wire/codec.ts';
import { type Dtype, tensorBytes } from '../../src/wire/dtype.ts';
import { type TensorId, tensorIdOf } from '../../src/wire/ids.ts';
import { proxiedId } from '../../support/ids.ts';
import { PythonPeer, pythonWith, seededBytes, sha256 } from '../../support/python-peer.ts';
import { rows, withTheOthers } from '../support/rows.ts';
import {
  failure,
  keptPort,
  leftovers,
  Services,
  send,
  type TestOptions,
  until,
} from '../support/transfer.ts';

const python = pythonWith('msgpack');
const pyzmq = pythonWith('msgpack, zmq');
const hasIpv6 = Object.values(networkInterfaces()).some((list) =>
  list?.some(({ address }) => address === '::1'),
);

const services = new Services();
const ROOM = { kvBufferSize: 8 * 2 ** 20 };
const peers: PythonPeer[] = [];
afterEach(async () => {
  await Promise.all(peers.splice(0).map((peer) => peer.dispose()));
  await services.dispose();
});

interface Ends {
  readonly sockets: 'zmtp' | 'pyzmq';
  readonly host: string;
}

async function peerOf({ sockets, host }: Ends, port = 0): Promise<PythonPeer> {
  const peer = await PythonPeer.start({
    python: (sockets === 'pyzmq' ? pyzmq : python)!,
    sockets,
    host,
    port,
  });
  peers.push(peer);
  return peer;
}

/** libzmq gives a port back a moment after its socket is closed. */
async function restarted(options: TestOptions): Promise<Awaited<ReturnType<typeof services.make>>> {
  const end = performance.now() + 60_000;
  for (;;) {
    try {
      return await services.make(options);
    } catch (error) {
      if (PdError.from(error).code !== 'PORT_IN_USE' || performance.now() > end) throw error;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
}

function seeded(id: string, shape: number[], dtype: Dtype, seed: number, peer?: HostPort): SendRequest {
  const memory = hostMemory(tensorBytes(shape, dtype));
  hostView(memory).set(seededBytes(shape, dtype, seed));
  const source = { kind: 'flat', memory } as const;
  return { tensorId: id as TensorId, shape, dtype, source, ...(peer && { peer }) };
}

/** Shapes of every family, and an element type of each size. */
const TENSORS: readonly { readonly shape: number[]; readonly dtype: Dtype }[] = [
  { shape: [2, 3, 16, 2, 8], dtype: 'bfloat16' },
  { shape: [3, 2, 16, 2, 8], dtype: 'float16' },
  { shape: [2, 40, 64], dtype: 'float32' },
  { shape: [3, 16, 576], dtype: 'uint8' },
  { shape: [40, 576], dtype: 'float8_e4m3fn' },
  { shape: [1], dtype: 'float64' },
  { shape: [2, 100, 16, 8, 32], dtype: 'bfloat16' },
];

const ENDS = rows<Ends & { readonly name: string; readonly there: boolean }>(
  [
    { name: 'own ZMTP, IPv4', sockets: 'zmtp', host: '127.0.0.1', there: python !== undefined },
    { name: 'pyzmq, IPv4', sockets: 'pyzmq', host: '127.0.0.1', there: pyzmq !== undefined },
  ],
  [{ name: 'own ZMTP, IPv6', sockets: 'zmtp', host: '::1', there: python !== undefined && hasIpv6 }],
);

if (python === undefined) console.warn('python-peer: skipped, no Python with msgpack (python3-msgpack)');
else if (pyzmq === undefined)
  console.warn('python-peer: pyzmq part skipped, no Python with zmq (python3-zmq)');

for (const ends of ENDS) {
  describe.skipIf(!ends.there)(`a Python peer, ${ends.name}`, () => {
    test('producer: its PUTs reach our consumer byte by byte', async () => {
      const consumer = await services.make({ ...ROOM, sendType: 'PUT', host: ends.host });
      const peer = await peerOf(ends);
      const id = proxiedId('a');
      for (const [seed, { shape, dtype }] of TENSORS.entries()) {
        const layer = `model.layers.${seed}.self_attn.attn`;
        const tensor_id = `${id}-0123abcd#${layer}`;
        const waiting = consumer.receive(tensorIdOf(id, layer), peer.address);
        const put = await peer.ask('put', {
          peer: formatHostPort(consumer.address),
          tensor_id,
          shape,
          dtype,
          seed,
        });
        expect(put['answer']).toBe('0');
        const tensor = await waiting;
        expect(tensor).toMatchObject({ shape, dtype });
        expect(sha256(hostView(tensor.memory))).toBe(put['sha256']);
      }
      consumer.finish(id);
      await until('all is free', () => leftovers(consumer).length === 0);
      await peer.quit();
    });

    test('consumer: our PUTs reach it, and it sees nothing that vLLM would not send', async () => {
      const producer = await services.make({ ...ROOM, sendType: 'PUT_ASYNC', host: ends.host });
      const peer = await peerOf(ends);
      const sends = TENSORS.map(({ shape, dtype }, seed) =>
        send(producer, seeded(`cmpl-b-0#layer.${seed}`, shape, dtype, seed, peer.address)),
      );
      for (const [seed, { shape, dtype }] of TENSORS.entries()) {
        const got = await peer.ask('received', { tensor_id: `cmpl-b-0#layer.${seed}` });
        expect(got).toMatchObject({ shape, dtype, from: formatHostPort(producer.address) });
        expect(got['sha256']).toBe(sha256(seededBytes(shape, dtype, seed)));
        await sends[seed]!.sent;
      }
      const { messages } = await peer.ask('messages');
      expect((messages as { cmd: string }[]).map(({ cmd }) => cmd)).toEqual([
        'NEW',
        ...TENSORS.map(() => 'PUT'),
      ]);
      await until('all is free', () => leftovers(producer).length === 0);
      await peer.quit();
    });

    test('consumer in GET: it asks our producer for what is there, and is told what is not', async () => {
      const producer = await services.make({
        ...ROOM,
        sendType: 'GET',
        host: ends.host,
        timeouts: { answer: 400 },
      });
      const peer = await peerOf(ends);
      const to = formatHostPort(producer.address);
      const id = proxiedId('c');
      for (const [seed, { shape, dtype }] of TENSORS.entries()) {
        await send(producer, seeded(`${id}#layer.${seed}`, shape, dtype, seed)).sent;
        const got = await peer.ask('get', { peer: to, tensor_id: `${id}-89abcdef#layer.${seed}` });
        expect(got).toMatchObject({ ret: 0, shape, dtype, sha256: sha256(seededBytes(shape, dtype, seed)) });
      }
      expect(await peer.ask('get', { peer: to, tensor_id: 'cmpl-none-0#layer.0' })).toMatchObject({ ret: 1 });
      await peer.quit();
    });

    test('producer in GET: our consumer asks it, also before it is there', async () => {
      const consumer = await services.make({ ...ROOM, sendType: 'GET', host: ends.host });
      const peer = await peerOf(ends);
      for (const [seed, { shape, dtype }] of TENSORS.entries()) {
        const tensor_id = `cmpl-d-0#layer.${seed}`;
        const early = seed === 0;
        const waiting = early ? consumer.receive(tensor_id as TensorId, peer.address, 60_000) : undefined;
        if (early) {
          await until('an answer {ret: 1}', () =>
            consumer.state().pairs.some(({ state }) => state === 'open'),
          );
        }
        await peer.ask('keep', { tensor_id, shape, dtype, seed });
        const tensor = await (waiting ?? consumer.receive(tensor_id as TensorId, peer.address, 60_000));
        expect(tensor).toMatchObject({ shape, dtype });
        expect(sha256(hostView(tensor.memory))).toBe(sha256(seededBytes(shape, dtype, seed)));
      }
      await peer.quit();
    });

    test('what it refuses fails that send alone', async () => {
      const producer = await services.make({ ...ROOM, sendType: 'PUT', host: ends.host });
      const peer = await peerOf(ends);
      await peer.ask('refuse', { count: 1 });
      const [first, second] = [1, 2].map((seed) =>
        send(producer, seeded(`cmpl-e-${seed}#l`, [8], 'uint8', seed, peer.address)),
      );
      expect((await failure(first!.sent)).code).toBe('KV_BUFFER_FULL');
      expect(await second!.sent).toBe(8);
      await peer.ask('received', { tensor_id: 'cmpl-e-2#l' });
      await peer.quit();
    });

    test('our consumer without room answers 1, and goes on', async () => {
      const consumer = await services.make({
        sendType: 'PUT',
        host: ends.host,
        kvBufferSize: 1_024,
        memPoolSize: 0,
      });
      const peer = await peerOf(ends);
      const to = { peer: formatHostPort(consumer.address), dtype: 'uint8', seed: 1 };
      const large = await peer.ask('put', { ...to, tensor_id: 'cmpl-f-0#l', shape: [4_096] });
      expect(large['answer']).toBe('1');
      const small = await peer.ask('put', { ...to, tensor_id: 'cmpl-f-1#l', shape: [512] });
      expect(small['answer']).toBe('0');
      await peer.quit();
    });

    test('our consumer restarts under a producer that keeps announcing: 1, a NEW from us, and then KV', async () => {
      const port = await keptPort(ends.host);
      const before = await services.make({ ...ROOM, sendType: 'PUT', host: ends.host, port });
      const peer = await peerOf(ends);
      const { address } = before;
      const to = formatHostPort(address);
      const put = (id: string) =>
        peer.attempt('put', { peer: to, tensor_id: `${id}#l`, shape: [64], dtype: 'uint8', seed: 3 });
      expect((await put('cmpl-g-0'))['answer']).toBe('0');
      await before.dispose();
      // What is sent before is lost with the old connection.
      await peer.ask('disconnected', { peer: to });
      const after = await restarted({ ...ROOM, sendType: 'PUT', host: ends.host, port: address.port });
      // It has a pair and a socket of before, so it sends no NEW.
      expect((await put('cmpl-g-1'))['answer']).toBe('1');
      await peer.ask('joined', { peer: to });
      const waiting = after.receive('cmpl-g-2#l' as TensorId, peer.address, 60_000);
      expect((await put('cmpl-g-2'))['answer']).toBe('0');
      expect(sha256(hostView((await waiting).memory))).toBe(sha256(seededBytes([64], 'uint8', 3)));
      await peer.quit();
    });

    test('pings: our proxy takes its, and a proxy of its kind understands ours', async () => {
      const peer = await peerOf(ends);
      const registry = new InstanceRegistry(10_000);
      const added = deferred<RegistryChange>();
      const discovery = await Discovery.start({
        bind: { host: ends.host, port: 0 },
        registry,
        log: createLogger({ level: 'silent', format: 'json' }, 'proxy'),
        sweepMs: 1_000,
        onChange: added.resolve,
      });
      services.add({ dispose: () => discovery.close() });
      const http_address = formatHostPort({ host: ends.host, port: 8081 });
      await peer.ask('ping', { proxy: formatHostPort(discovery.address), type: 'P', http_address });
      await added.promise;
      expect(registry.list('producer')).toMatchObject([
        { httpAddress: http_address, zmqAddress: formatHostPort(peer.address) },
      ]);
      const engine = await services.make({ host: ends.host });
      engine.startPing({ proxies: [peer.address], type: 'D', httpAddress: http_address, intervalMs: 3_000 });
      expect(await peer.ask('pinged')).toMatchObject({
        type: 'D',
        http_address,
        zmq_address: formatHostPort(engine.address),
      });
      await peer.quit();
    });

    test('ids: ours finds what it sends under a suffix or none, and is told by what it asks for', async () => {
      const [putter, getter, producer] = await Promise.all(
        (['PUT', 'GET', 'GET'] as const).map((sendType) =>
          services.make({ ...ROOM, sendType, host: ends.host }),
        ),
      );
      const peer = await peerOf(ends);
      const fields = { shape: [64], dtype: 'uint8', seed: 5 };
      for (const [at, theirs] of ['', '-01234567'].entries()) {
        const id = proxiedId(`q${at}`);
        const put = { ...fields, peer: formatHostPort(putter!.address), tensor_id: `${id}${theirs}#l` };
        const waiting = putter!.receive(tensorIdOf(id, 'l'), peer.address);
        expect((await peer.ask('put', put))['answer']).toBe('0');
        expect((await waiting).tensorId).toBe(`${id}${theirs}#l`);
        // Ours asks a producer that cannot know suffixes: by the transfer id, which is what such a one keys by.
        await peer.ask('keep', { ...fields, tensor_id: `${id}#l` });
        const asked = await getter!.receive(tensorIdOf(id, 'l'), peer.address);
        expect(asked.shape).toEqual([64]);
        // It asks ours, under its own suffix.
        await send(producer!, seeded(`${id}#l`, [64], 'uint8', 5)).sent;
        const got = await peer.ask('get', {
          peer: formatHostPort(producer!.address),
          tensor_id: `${id}${theirs}#l`,
        });
        expect(got).toMatchObject({ ret: 0 });
      }
      await peer.quit();
    });

    test('ids that no proxy has made are whole, unless it is said that any may have a suffix', async () => {
      const lines: string[] = [];
      const peer = await peerOf(ends);
      for (const suffixedIds of ['proxy', 'any'] as const) {
        const consumer = await services.make({ ...ROOM, sendType: 'PUT', host: ends.host, suffixedIds });
        const to = formatHostPort(consumer.address);
        const [wanted, sent] = [`order-${suffixedIds}#l`, `order-${suffixedIds}-20261128#l`];
        // Its deadline may pass before the peer has put anything.
        const waiting = consumer
          .receive(wanted as TensorId, peer.address, suffixedIds === 'any' ? undefined : 300)
          .then(
            ({ tensorId }) => tensorId as string,
            (error: unknown) => PdError.from(error).code,
          );
        expect(
          (await peer.ask('put', { peer: to, tensor_id: sent, shape: [64], dtype: 'uint8', seed: 5 }))[
            'answer'
          ],
        ).toBe('0');
        lines.push(`${suffixedIds}: ${await waiting}`);
      }
      expect(lines).toEqual(['proxy: KV_LOAD_TIMEOUT', 'any: order-any-20261128#l']);
      await peer.quit();
    });

    test('two requests that could be meant by one id are not mixed up: the second gets nothing', async () => {
      const producer = await services.make({
        ...ROOM,
        sendType: 'GET',
        host: ends.host,
        timeouts: { answer: 200 },
      });
      const peer = await peerOf(ends);
      const to = formatHostPort(producer.address);
      const id = proxiedId('s');
      await send(producer, seeded(`${id}#l`, [64], 'uint8', 1)).sent;
      const first = await peer.ask('get', { peer: to, tensor_id: `${id}-89abcdef#l` });
      expect(first).toMatchObject({ ret: 0, sha256: sha256(seededBytes([64], 'uint8', 1)) });
      expect(await peer.ask('get', { peer: to, tensor_id: `${id}-76543210#l` })).toMatchObject({ ret: 1 });
      expect(await peer.ask('get', { peer: to, tensor_id: `${id}#l` })).toMatchObject({ ret: 0 });
      await peer.quit();
    });

    test('the newest pair carries both directions, whoever sent NEW, and in whichever order', async () => {
      const engine = await services.make({ ...ROOM, sendType: 'PUT', host: ends.host });
      const peer = await peerOf(ends);
      const to = formatHostPort(engine.address);
      const both = async (round: string) => {
        const fields = { shape: [100_000], dtype: 'uint8', seed: 70 };
        const theirs = `cmpl-${round}-0#theirs`;
        const waiting = engine.receive(theirs as TensorId, peer.address, 60_000);
        const put = await peer.ask('put', { peer: to, tensor_id: theirs, ...fields });
        expect([round, put['answer']]).toEqual([round, '0']);
        expect(sha256(hostView((await waiting).memory))).toBe(put['sha256']);
        const ours = `cmpl-${round}-0#ours`;
        await send(engine, seeded(ours, [100_000], 'uint8', 7, peer.address)).sent;
        expect((await peer.ask('received', { tensor_id: ours }))['sha256']).toBe(
          sha256(seededBytes([100_000], 'uint8', 7)),
        );
      };
      await both('they-then-we'); // its NEW, then ours, which takes the place of its own
      await both('ours-is-newest');
      await peer.ask('new', { peer: to }); // and now its own again
      await both('theirs-is-newest');
      await both('and-stays');
      expect(leftovers(engine).filter((text) => !text.includes('held') && !text.includes('used'))).toEqual(
        [],
      );
      await peer.quit();
    });

    test('the other direction goes over the pair that is there, as it knows but one per address', async () => {
      const engine = await services.make({ ...ROOM, sendType: 'PUT', host: ends.host });
      const peer = await peerOf(ends);
      const to = formatHostPort(engine.address);
      for (let round = 0; round < 3; round++) {
        const ours = `cmpl-h-${round}#ours`;
        await send(engine, seeded(ours, [100_000], 'uint8', round, peer.address)).sent;
        await peer.ask('received', { tensor_id: ours });
        const theirs = `cmpl-h-${round}#theirs`;
        const waiting = engine.receive(theirs as TensorId, peer.address, 60_000);
        const put = await peer.ask('put', {
          peer: to,
          tensor_id: theirs,
          shape: [100_000],
          dtype: 'uint8',
          seed: 70,
        });
        expect(put['answer']).toBe('0');
        expect(sha256(hostView((await waiting).memory))).toBe(put['sha256']);
      }
      await peer.quit();
    });
  });
}

describe.skipIf(python === undefined || withTheOthers)('the peer itself', () => {
  const answers: [what: string, op: string, answers: (cmd: string) => Uint8Array[]][] = [
    ['an answer to NEW', 'put', () => [Uint8Array.of(0x80)]],
    ['an answer 2', 'put', (cmd) => (cmd === 'PUT' ? [Buffer.from('2')] : [])],
    ['a map for a PUT', 'put', (cmd) => (cmd === 'PUT' ? [encodeAnswer({ kind: 'get', ret: 1 })] : [])],
    ['a raw byte for a GET', 'get', (cmd) => (cmd === 'GET' ? [Buffer.from('1')] : [])],
  ];
  test.each(answers)('fails loudly at %s', async (_, op, answersTo) => {
    const router = new zmq.Router({ linger: 0 });
    services.add({ dispose: async () => router.close() });
    await router.bind('tcp://127.0.0.1:*');
    const transport = await HostTransport.create({ bindHost: '127.0.0.1', announceHost: '127.0.0.1' });
    services.add(transport);
    void (async () => {
      for await (const [identity, body] of router) {
        const message = decodeMessage(body!, DEFAULT_LIMITS);
        if (message.cmd === 'NEW') {
          const options = { uniqueId: message.unique_id, rank: 1, peer: 'peer', timeoutMs: 60_000 } as const;
          void transport.open(options).catch(() => {});
        }
        for (const answer of answersTo(message.cmd)) await router.send([identity!, answer]);
      }
    })();
    const peer = await peerOf({ sockets: 'zmtp', host: '127.0.0.1' });
    const fields = { tensor_id: 'a#l', shape: [4], dtype: 'uint8', seed: 1 };
    const to = router.lastEndpoint!.replace('tcp://', '');
    await expect(peer.ask(op, { peer: to, ...fields })).rejects.toThrow(/status 3\nviolation: /);
  });
});
