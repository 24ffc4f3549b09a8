import { createHash, randomBytes } from 'node:crypto';
import { connect, createServer, type Socket } from 'node:net';
import fc from 'fast-check';
import { afterEach, describe, expect, test } from 'vitest';
import { createDevice } from '../../src/device/create-device.ts';
import type { MemoryRef } from '../../src/device/device.ts';
import { hostMemory, hostView, sliceMemory } from '../../src/device/memory.ts';
import { PdError } from '../../src/errors.ts';
import { createTransport } from '../../src/transport/create-transport.ts';
import { HostTransport } from '../../src/transport/host/transport.ts';
import { decodeUniqueId, encodeUniqueId } from '../../src/transport/host/unique-id.ts';
import type { Pair, Transport } from '../../src/transport/transport.ts';
import type { UniqueId } from '../../src/wire/messages.ts';
import { withStoppedClock } from '../support/stopped-clock.ts';

const MB = 2 ** 20;
const options = (tensorId = 'r#layer.0', timeoutMs = 60_000) => ({ tensorId, timeoutMs });

const owned: Transport[] = [];
async function transport(host = '127.0.0.1', acceptor = { handshake: 60_000, parked: 60_000 }) {
  const made = await HostTransport.create({ bindHost: host, announceHost: host, acceptor });
  owned.push(made);
  return made;
}

async function pairOf(host?: string): Promise<{ a: HostTransport; b: HostTransport; zero: Pair; one: Pair }> {
  const [a, b] = [await transport(host), await transport(host)];
  const uniqueId = a.createUniqueId();
  const [zero, one] = await Promise.all([
    a.open({ uniqueId, rank: 0, peer: 'b', timeoutMs: 60_000 }),
    b.open({ uniqueId, rank: 1, peer: 'a', timeoutMs: 60_000 }),
  ]);
  return { a, b, zero, one };
}

function filled(bytes: number): MemoryRef {
  const memory = hostMemory(bytes);
  const view = hostView(memory);
  for (let at = 0; at < bytes; at += 65_536) view.set(randomBytes(Math.min(65_536, bytes - at)), at);
  return memory;
}

const digest = (memory: MemoryRef) =>
  createHash('sha256')
    .update(Buffer.from(hostView(memory)))
    .digest('hex');

const dataAddress = (id: UniqueId) => decodeUniqueId(id, 'test').address;

/** Resolves when the other end has closed the connection. */
const closedBy = (socket: Socket) =>
  new Promise<void>((resolve) => socket.once('close', () => resolve()).resume());

afterEach(async () => {
  await Promise.all(owned.splice(0).map((made) => made.dispose()));
});

describe.each(['127.0.0.1', '::1'])('a pair over %s', (host) => {
  test('bytes arrive in order, both ways, in regions cut differently', async () => {
    const { zero, one } = await pairOf(host);
    const source = filled(3 * MB + 17);
    const target = hostMemory(source.bytes);
    const back = hostMemory(source.bytes);
    await Promise.all([
      zero.send([sliceMemory(source, 0, 5), sliceMemory(source, 5, source.bytes - 5)], options()),
      one.receive([sliceMemory(target, 0, 2 * MB), sliceMemory(target, 2 * MB, MB + 17)], options()),
    ]);
    await Promise.all([one.send([target], options()), zero.receive([back], options())]);
    expect(digest(target)).toBe(digest(source));
    expect(digest(back)).toBe(digest(source));
    expect([zero.pending, one.pending]).toEqual([0, 0]);
  });
});

describe('a pair', () => {
  test('rank 1 may come before rank 0 opens', async () => {
    const [a, b] = [await transport(), await transport()];
    const uniqueId = a.createUniqueId();
    const early = b.open({ uniqueId, rank: 1, peer: 'a', timeoutMs: 60_000 });
    const [pair] = await Promise.race([
      new Promise<[Pair]>((resolve) =>
        // The connection is parked once the kernel has taken it; opening later must find it.
        setImmediate(async () =>
          resolve([await a.open({ uniqueId, rank: 0, peer: 'b', timeoutMs: 60_000 })]),
        ),
      ),
    ]);
    const target = hostMemory(8);
    await Promise.all([pair.send([filled(8)], options()), (await early).receive([target], options())]);
  });

  test('property: any sequence of operations of any sizes, with receives posted early or late', async () => {
    const { zero, one } = await pairOf();
    const size = fc.oneof(fc.nat(40), fc.nat(40_000), fc.nat(600_000));
    const operation = fc.record({ regions: fc.array(size, { maxLength: 4 }), late: fc.boolean() });
    await fc.assert(
      fc.asyncProperty(fc.array(operation, { minLength: 1, maxLength: 12 }), async (operations) => {
        const moves: Promise<void>[] = [];
        const checks: [MemoryRef, MemoryRef][] = [];
        for (const { regions, late } of operations) {
          const total = regions.reduce((sum, bytes) => sum + bytes, 0);
          const [source, target] = [filled(total), hostMemory(total)];
          let at = 0;
          const cut = regions.map((bytes) => {
            at += bytes;
            return sliceMemory(source, at - bytes, bytes);
          });
          checks.push([source, target]);
          moves.push(zero.send(cut, options()));
          if (late) await new Promise((resolve) => setImmediate(resolve));
          moves.push(one.receive([target], options()));
        }
        await Promise.all(moves);
        for (const [source, target] of checks) expect(digest(target)).toBe(digest(source));
      }),
      { numRuns: 30 },
    );
  });

  test('2,000 small operations queued at once', async () => {
    const { zero, one } = await pairOf();
    const source = filled(2_000 * 512);
    const target = hostMemory(source.bytes);
    const each = (memory: MemoryRef, act: (part: MemoryRef) => Promise<void>) =>
      Array.from({ length: 2_000 }, (_, i) => act(sliceMemory(memory, i * 512, 512)));
    await Promise.all([
      ...each(source, (part) => zero.send([part], options())),
      ...each(target, (part) => one.receive([part], options())),
    ]);
    expect(digest(target)).toBe(digest(source));
  });

  test('while no receive is posted the sender waits, and nothing is buffered here', async () => {
    const { zero, one } = await pairOf();
    const source = filled(64 * MB);
    let sent = false;
    const sending = zero.send([source], options()).then(() => {
      sent = true;
    });
    const before = process.memoryUsage().external;
    for (let turn = 0; turn < 200; turn++) await new Promise((resolve) => setImmediate(resolve));
    expect(sent).toBe(false);
    expect(process.memoryUsage().external - before).toBeLessThan(4 * MB);
    const target = hostMemory(source.bytes);
    await one.receive([target], options());
    await sending;
    expect(digest(target)).toBe(digest(source));
  });

  test('a frame of another length ends the pair and names tensor and sizes', async () => {
    const { zero, one } = await pairOf();
    const sent = zero.send([filled(100)], options('r#layer.1')).catch((error: unknown) => error);
    const received = one.receive([hostMemory(99)], options('r#layer.1'));
    await expect(received).rejects.toMatchObject({ code: 'KV_SHAPE_MISMATCH' });
    await expect(received).rejects.toThrow(/r#layer\.1.*100 bytes where 99/);
    expect((await one.over).code).toBe('KV_SHAPE_MISMATCH');
    expect((await zero.over).code).toBe('PEER_LOST');
    await sent;
  });

  test('a deadline ends that pair only, and says how far each operation came', async () => {
    const { a, b, zero, one } = await pairOf();
    const uniqueId = a.createUniqueId();
    const [otherZero, otherOne] = await Promise.all([
      a.open({ uniqueId, rank: 0, peer: 'b', timeoutMs: 60_000 }),
      b.open({ uniqueId, rank: 1, peer: 'a', timeoutMs: 60_000 }),
    ]);
    const first = one.receive([hostMemory(100)], options('r#0', 20));
    const second = one.receive([hostMemory(100)], options('r#1', 20));
    const outcomes = await Promise.allSettled([first, second]);
    expect(outcomes).toMatchObject([
      { reason: { code: 'TRANSFER_TIMEOUT', context: { tensorId: 'r#0', peer: 'a' } } },
      { reason: { code: 'TRANSFER_TIMEOUT', context: { tensorId: 'r#1' } } },
    ]);
    await expect(first).rejects.toThrow(/0 of 100 bytes done/);
    await expect(second).rejects.toThrow(/not started/);
    expect((await one.over).code).toBe('TRANSFER_TIMEOUT');
    expect((await zero.over).code).toBe('PEER_LOST');
    const target = hostMemory(8);
    await Promise.all([otherZero.send([filled(8)], options()), otherOne.receive([target], options())]);
  });

  test('the deadline of an operation starts when those before it are done', async () => {
    const { zero, one } = await pairOf();
    await withStoppedClock(async (clock) => {
      const slow = one.receive([hostMemory(10)], options('r#0', 60_000));
      const quick = one.receive([hostMemory(10)], options('r#1', 300));
      clock.passes(350);
      await new Promise((resolve) => setImmediate(resolve)); // a deadline that has passed takes one more turn
      expect(one.pending).toBe(2);
      await Promise.all([
        ...[zero.send([filled(10)], options()), zero.send([filled(10)], options())],
        ...[slow, quick],
      ]);
    });
  });

  test('a peer that goes away in mid-transfer is found at once; later operations fail with the same code', async () => {
    const { a, zero, one } = await pairOf();
    const sending = zero.send([filled(64 * MB)], options()).catch((error: unknown) => error);
    const received = one.receive([hostMemory(64 * MB)], options()).catch((error: unknown) => error);
    await a.dispose();
    expect(await received).toMatchObject({ code: 'PEER_LOST' });
    expect((await one.over).code).toBe('PEER_LOST');
    await expect(one.receive([hostMemory(1)], options())).rejects.toMatchObject({ code: 'PEER_LOST' });
    await expect(one.send([hostMemory(1)], options())).rejects.toMatchObject({ code: 'PEER_LOST' });
    expect(await sending).toMatchObject({ code: 'ENGINE_CLOSED' });
  });

  test('an idle pair notices that its peer has gone', async () => {
    const { a, one } = await pairOf();
    await a.dispose();
    expect((await one.over).code).toBe('PEER_LOST');
  });

  test('abort is immediate and idempotent; what was flushed before it still arrives', async () => {
    const { zero, one } = await pairOf();
    const source = filled(1000);
    const target = hostMemory(1000);
    await zero.send([source], options());
    const waiting = zero.receive([hostMemory(1)], options());
    zero.abort(new PdError('PAIR_CLOSED', 'idle'));
    zero.abort(new PdError('INTERNAL', 'again'));
    await expect(waiting).rejects.toMatchObject({ code: 'PAIR_CLOSED' });
    await one.receive([target], options());
    expect(digest(target)).toBe(digest(source));
    expect((await zero.over).code).toBe('PAIR_CLOSED');
    expect((await one.over).code).toBe('PEER_LOST');
  });

  test('memory that is not host memory is refused before anything is sent', async () => {
    const { zero, one } = await pairOf();
    const cuda = { kind: 'cuda', device: 0, pointer: 1n as never, bytes: 4 } as const;
    await expect(zero.send([cuda], options())).rejects.toMatchObject({ code: 'INTERNAL' });
    const target = hostMemory(4);
    await Promise.all([zero.send([filled(4)], options()), one.receive([target], options())]);
  });
});

describe('opening', () => {
  test('without a peer it ends at its deadline, and a peer that comes later is turned away', async () => {
    const [a, b] = [await transport(), await transport()];
    const uniqueId = a.createUniqueId();
    const alone = a.open({ uniqueId, rank: 0, peer: 'b', timeoutMs: 20 });
    await expect(alone).rejects.toMatchObject({ code: 'PAIR_INIT_TIMEOUT', context: { peer: 'b' } });
    const late = b.open({ uniqueId, rank: 1, peer: 'a', timeoutMs: 60_000 });
    await expect(late).rejects.toMatchObject({ code: 'PEER_LOST' });
  });

  test('a rank 0 that has gone is unreachable at once', async () => {
    const [a, b] = [await transport(), await transport()];
    const uniqueId = a.createUniqueId();
    await a.dispose();
    const open = b.open({ uniqueId, rank: 1, peer: 'a', timeoutMs: 60_000 });
    await expect(open).rejects.toMatchObject({ code: 'PEER_UNREACHABLE' });
  });

  test('a rank 0 that accepts and says nothing ends at the deadline; one that answers otherwise is refused', async () => {
    const b = await transport();
    const sockets: Socket[] = [];
    let greeting = '';
    const impostor = createServer((socket) => {
      sockets.push(socket.on('error', () => {}));
      socket.write(greeting);
    });
    await new Promise<void>((resolve) => impostor.listen(0, '127.0.0.1', resolve));
    const { port } = impostor.address() as { port: number };
    const uniqueId = encodeUniqueId({ host: '127.0.0.1', port });
    const silent = b.open({ uniqueId, rank: 1, peer: 'a', timeoutMs: 30 });
    await expect(silent).rejects.toMatchObject({ code: 'PAIR_INIT_TIMEOUT' });
    greeting = 'HTTP/1.1 400 Bad Request\r\n\r\n';
    const wrong = b.open({ uniqueId, rank: 1, peer: 'a', timeoutMs: 60_000 });
    await expect(wrong).rejects.toMatchObject({ code: 'MESSAGE_INVALID' });
    for (const socket of sockets) socket.destroy();
    await new Promise((resolve) => impostor.close(resolve));
  });

  test('a wrong token, garbage, and a connection that says nothing are closed; the pair still opens', async () => {
    const acceptor = { handshake: 30, parked: 60_000 };
    const [a, b] = [await transport('127.0.0.1', acceptor), await transport()];
    const uniqueId = a.createUniqueId();
    const { host, port } = dataAddress(uniqueId);
    const strangers = ['', 'GET / HTTP/1.1\r\n\r\n'.repeat(4), `PDHT\u0001\0\0\0${'x'.repeat(16)}`].map(
      (greeting) => {
        const socket = connect({ host, port }).on('error', () => {});
        socket.write(greeting);
        return closedBy(socket);
      },
    );
    await Promise.all(strangers);
    acceptor.handshake = 60_000;
    const [zero, one] = await Promise.all([
      a.open({ uniqueId, rank: 0, peer: 'b', timeoutMs: 60_000 }),
      b.open({ uniqueId, rank: 1, peer: 'a', timeoutMs: 60_000 }),
    ]);
    const target = hostMemory(8);
    await Promise.all([zero.send([filled(8)], options()), one.receive([target], options())]);
  });

  test('a token serves once', async () => {
    const { a, b } = await pairOf();
    const uniqueId = a.createUniqueId();
    const open = () => b.open({ uniqueId, rank: 1, peer: 'a', timeoutMs: 60_000 });
    const outcomes = Promise.allSettled([open(), open()]);
    await a.open({ uniqueId, rank: 0, peer: 'b', timeoutMs: 60_000 });
    expect((await outcomes).map(({ status }) => status).toSorted()).toEqual(['fulfilled', 'rejected']);
  });

  test('a connection whose pair is never opened here is closed', async () => {
    const [a, b] = [await transport('127.0.0.1', { handshake: 60_000, parked: 20 }), await transport()];
    const open = b.open({ uniqueId: a.createUniqueId(), rank: 1, peer: 'a', timeoutMs: 60_000 });
    await expect(open).rejects.toMatchObject({ code: 'PEER_LOST' });
  });

  test('an id of NCCL, or of a later version, says so', async () => {
    const b = await transport();
    const open = (uniqueId: Uint8Array) =>
      b.open({ uniqueId: uniqueId as UniqueId, rank: 1, peer: 'a', timeoutMs: 60_000 });
    await expect(open(randomBytes(128).fill(1, 0, 4))).rejects.toThrow(/NCCL/);
    const later = encodeUniqueId({ host: '::1', port: 1 });
    later[4] = 2;
    await expect(open(later)).rejects.toThrow(/version 2/);
    const nowhere = encodeUniqueId({ host: '::1', port: 1 }).fill(0x20, 8, 20) as UniqueId;
    await expect(open(nowhere)).rejects.toMatchObject({ code: 'MESSAGE_INVALID' });
  });

  test('dispose ends what is opening, both sides, and twice is once', async () => {
    const a = await transport();
    const waiting = a.open({ uniqueId: a.createUniqueId(), rank: 0, peer: 'b', timeoutMs: 60_000 });
    const outcome = expect(waiting).rejects.toMatchObject({ code: 'ENGINE_CLOSED' });
    await Promise.all([a.dispose(), a.dispose()]);
    await outcome;
    expect(() => a.createUniqueId()).toThrow(/disposed/);
  });

  test('the transport of the host device pairs with itself', async () => {
    const device = await createDevice('host');
    const hosts = { bindHost: '0.0.0.0', announceHost: '127.0.0.1', ncclNumChannels: 8 };
    const a = await createTransport(device, hosts);
    expect(a.kind).toBe('host');
    owned.push(a);
    const uniqueId = a.createUniqueId();
    const [zero, one] = await Promise.all(
      ([0, 1] as const).map((rank) => a.open({ uniqueId, rank, peer: 'a', timeoutMs: 60_000 })),
    );
    const target = hostMemory(8);
    await Promise.all([zero!.send([filled(8)], options()), one!.receive([target], options())]);
  });
});
