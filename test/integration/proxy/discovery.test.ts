import { once } from 'node:events';
import { PassThrough } from 'node:stream';
import pino from 'pino';
import { afterEach, describe, expect, test } from 'vitest';
import { Dealer } from 'zeromq';
import { type HostPort, zmqEndpoint } from '../../../src/net/address.ts';
import { Discovery } from '../../../src/proxy/discovery.ts';
import { InstanceRegistry, type RegistryChange } from '../../../src/proxy/registry.ts';
import { encodePing } from '../../../src/wire/codec.ts';
import { sendPing, sendRaw } from '../../support/fake-upstream.ts';

/** A discovery whose changes and log lines can be awaited one by one. */
async function setUp(host = '127.0.0.1', now?: () => number) {
  const registry = new InstanceRegistry(10_000, now);
  const changes = new PassThrough({ objectMode: true });
  const lines: string[] = [];
  const log = pino({ level: 'info' }, { write: (line: string) => void lines.push(JSON.parse(line).msg) });
  let bad = 0;
  const discovery = await Discovery.start({
    bind: { host, port: 0 },
    registry,
    log,
    sweepMs: 10,
    onChange: (change) => changes.write(change),
    onBadPing: () => bad++,
  });
  open.push(discovery);
  const next = async (): Promise<RegistryChange> => {
    const waiting = changes.read() as RegistryChange | null;
    if (waiting) return waiting;
    await once(changes, 'readable');
    return changes.read() as RegistryChange;
  };
  return { registry, discovery, lines, next, bad: () => bad, address: discovery.address };
}

const open: Discovery[] = [];
const closing: Dealer[] = [];
afterEach(async () => {
  for (const dealer of closing.splice(0)) dealer.close();
  for (const discovery of open.splice(0)) await discovery.close();
});

const producer = (to: HostPort, port = 8081) =>
  sendPing(to, { type: 'P', http_address: `127.0.0.1:${port}`, zmq_address: `127.0.0.1:${port + 1}` });

describe('pings', () => {
  test.each(['127.0.0.1', '::1'])(
    'over %s add an instance, with the line that people search for',
    async (host) => {
      const { registry, lines, next, address } = await setUp(host);
      const literal = host.includes(':') ? `[${host}]` : host;
      await sendPing(address, { type: 'P', http_address: `${literal}:8081`, zmq_address: `${literal}:8082` });
      await next();
      await sendPing(address, {
        type: 'D',
        http_address: `${literal}:8083`,
        zmq_address: `${literal}:8084`,
        native: { version: 1, digest: 'abc', model: 'demo' },
      });
      await next();
      expect(registry.list().map(({ role, http, fingerprint }) => ({ role, http, fingerprint }))).toEqual([
        { role: 'producer', http: { host, port: 8081 }, fingerprint: undefined },
        { role: 'consumer', http: { host, port: 8083 }, fingerprint: { digest: 'abc', model: 'demo' } },
      ]);
      expect(lines[0]).toContain(`🔵Add [HTTP:${literal}:8081, ZMQ:${literal}:8082]`);
      expect(lines[1]).toContain(`🔵Add [HTTP:${literal}:8083, ZMQ:${literal}:8084]`);
    },
  );

  test('that are none are counted and do not end discovery', async () => {
    const { lines, next, bad, address } = await setUp();
    const junk = [
      Buffer.from('not msgpack at all'),
      Buffer.alloc(250, 0xdd), // nested array headers
      Buffer.alloc(0),
      Buffer.from([0x81, 0xa4, 0x74, 0x79, 0x70, 0x65, 0xa1, 0x58]), // {type: "X"}
    ];
    for (const [i, body] of junk.entries()) await sendRaw(address, body, `10.0.0.1:${i}`);
    await sendPing(address, { type: 'P', http_address: 'no address', zmq_address: '127.0.0.1:1' });
    while (bad() < junk.length + 1) await new Promise((resolve) => setImmediate(resolve));
    await producer(address);
    expect((await next()).kind).toBe('added');
    expect(lines.filter((line) => line.startsWith('ignored a ping'))).toHaveLength(1); // the rest are suppressed
  });

  test('of an instance that was named as well are of the same one, also if it was taken for one of vLLM', async () => {
    const { registry, discovery, next, lines } = await setUp();
    const [at, http_address] = [{ host: '127.0.0.1', port: 8081 }, '127.0.0.1:8081'];
    const said = { type: 'P', http_address, zmq_address: '127.0.0.1:8082' } as const;
    const ping = { ...said, native: { version: 1, digest: 'abc', model: 'demo' } };
    discovery.take(encodePing(ping));
    await next();
    for (const more of [said, ping]) expect(discovery.takeNamed(more, { at, tls: false })).toBe(true);
    discovery.take(encodePing(ping));
    expect(registry.list()).toMatchObject([{ fingerprint: { digest: 'abc' } }]);
    expect(lines).toHaveLength(1);
  });

  test('of a process that has restarted stand against what etcd still says of the one before', async () => {
    const { registry, discovery, lines } = await setUp();
    const said = { type: 'P', http_address: '127.0.0.1:8081', zmq_address: '127.0.0.1:8082' } as const;
    const [before, now] = [1_000, 2_000].map((started) =>
      encodePing({ ...said, native: { version: 1, digest: 'abc', model: 'demo', started } }),
    ) as [Uint8Array, Uint8Array];
    discovery.take(before);
    discovery.take(now);
    registry.drain(said.http_address, true);
    const told = lines.length;
    // etcd is away, or has not been told yet; then the lease of the one before ends.
    expect(discovery.takeAgain(before)).toBe(true);
    discovery.drop(before);
    const [instance] = registry.list();
    expect(registry.standing(instance!)).toMatchObject({ instance: { started: 2_000 }, draining: true });
    expect(lines).toHaveLength(told);
    discovery.drop(now);
    expect(registry.list()).toEqual([]);
    discovery.takeAgain(before);
    expect(registry.list()).toHaveLength(1);
  });

  test('that stop remove the instance; one that comes back is added again', async () => {
    let now = 0;
    const { lines, next, address, registry } = await setUp('127.0.0.1', () => now);
    await producer(address);
    await next();
    now += 10_001;
    expect(await next()).toMatchObject({ kind: 'removed', reason: 'expired' });
    expect(registry.list()).toEqual([]);
    expect(lines.at(-1)).toContain('Remove [HTTP:127.0.0.1:8081, ZMQ:127.0.0.1:8082]');
    await producer(address);
    expect((await next()).kind).toBe('added');
  });

  test('of a restarted process, with the same routing id over a new connection, are heard', async () => {
    const { next, address, registry } = await setUp();
    await producer(address);
    await next();
    await sendPing(address, {
      type: 'D',
      http_address: '127.0.0.1:8081',
      zmq_address: '127.0.0.1:8082',
    });
    expect((await next()).kind).toBe('removed');
    expect((await next()).kind).toBe('added');
    expect(registry.list('consumer')).toHaveLength(1);
  });

  test('of a worker whose KV address another one announces too go on to be heard', async () => {
    const { next, address, registry } = await setUp();
    const ping = { type: 'P', http_address: '127.0.0.1:8081', zmq_address: '127.0.0.1:8082' } as const;
    const first = new Dealer({ routingId: ping.zmq_address, linger: 0 });
    closing.push(first);
    first.connect(zmqEndpoint(address));
    await first.send(encodePing(ping));
    await next();
    await sendPing(address, { ...ping, http_address: '127.0.0.1:8091' });
    expect((await next()).kind).toBe('removed');
    await next();
    await first.send(encodePing(ping));
    expect((await next()).kind).toBe('removed');
    await next();
    expect(registry.list()).toMatchObject([{ httpAddress: '127.0.0.1:8081' }]);
  });

  test('of two workers that announce one KV address are told once, with what to do', async () => {
    const { next, discovery, lines } = await setUp();
    const ping = { type: 'P', zmq_address: '127.0.0.1:8082' } as const;
    for (let i = 0; i < 10; i++) {
      for (const port of [8081, 8091])
        discovery.take(encodePing({ ...ping, http_address: `127.0.0.1:${port}` }));
    }
    for (let i = 0; i < 39; i++) await next();
    expect(lines.map((line) => line.split(' (')[0])).toEqual([
      '🔵Add [HTTP:127.0.0.1:8081, ZMQ:127.0.0.1:8082]',
      '🔴Remove [HTTP:127.0.0.1:8081, ZMQ:127.0.0.1:8082]',
      '🔵Add [HTTP:127.0.0.1:8091, ZMQ:127.0.0.1:8082]',
      expect.stringMatching(/8081.* and .*8091.* announce the same KV address.*--kv-port/),
    ]);
  });

  test('that cannot be used are told with the address that they give', async () => {
    const { discovery, lines } = await setUp();
    const native = { version: 1, digest: 'd', model: 'm' };
    const load = { running: -1, waiting: 0, kvUsed: 0, kvBlocks: 1, queuedTokens: 0 };
    const [http_address, zmq_address] = ['10.0.0.5:8081', '10.0.0.5:8082'];
    expect(
      discovery.take(encodePing({ type: 'P', http_address, zmq_address, native: { ...native, load } })),
    ).toBe(false);
    expect(lines).toEqual([expect.stringMatching(/10\.0\.0\.5:8081.*running is -1/)]);
  });

  test('cannot be listened for at a name without an address', async () => {
    await expect(setUp('no-such-host.invalid')).rejects.toMatchObject({
      code: 'ADDRESS_INVALID',
      message: expect.stringContaining('no-such-host.invalid'),
    });
  });

  test('a port that is taken is named', async () => {
    const { address } = await setUp();
    await expect(
      Discovery.start({
        bind: address,
        registry: new InstanceRegistry(1_000),
        log: pino({ level: 'silent' }),
        sweepMs: 1_000,
      }),
    ).rejects.toMatchObject({ code: 'PORT_IN_USE', message: expect.stringContaining(String(address.port)) });
  });
});
