/** Instances that find proxies, and are found, by way of etcd: the real one, and some that lie or hang. */
import { createServer, type ServerResponse } from 'node:http';
import { type AddressInfo, connect, createServer as createTcpServer, type Socket } from 'node:net';
import { join } from 'node:path';
import pino from 'pino';
import { afterEach, describe, expect, it } from 'vitest';
import { formatHostPort } from '../../src/net/address.ts';
import { Etcd, parseEtcdAddress } from '../../src/net/etcd.ts';
import { EtcdInstances } from '../../src/proxy/etcd-instances.ts';
import { EtcdRegistration } from '../../src/transfer/etcd-registration.ts';
import { startProxy, startWorker, untilListed } from '../support/cluster.ts';
import { EtcdServer, NO_ETCD } from '../support/etcd.ts';
import { askThrough, countsOf, load, RIGHT, startWorkers } from '../support/fleet.ts';
import { sharedTempDir } from '../support/temp-dir.ts';

const DIR = sharedTempDir();
let folders = 0;
const closing: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

/** What a proxy knows, and what is logged; each of its changes can be awaited. */
function follow(etcd: Etcd) {
  const known = new Map<string, number>();
  const lines: string[] = [];
  let wake = () => {};
  const changed = (): void => wake();
  const write = (line: string) => {
    lines.push((JSON.parse(line) as { msg: string }).msg);
    changed();
  };
  const log = pino({}, { write });
  const take = (ping: Uint8Array): boolean => {
    const text = Buffer.from(ping).toString();
    if (text === 'nonsense') return false;
    known.set(text, (known.get(text) ?? 0) + 1);
    changed();
    return true;
  };
  const instances = new EtcdInstances(etcd, log, {
    take,
    // What stands there, and no news.
    takeAgain: (ping) => known.has(Buffer.from(ping).toString()) && take(ping),
    drop: (ping) => {
      known.delete(Buffer.from(ping).toString());
      changed();
    },
  });
  closing.push(() => instances.close());
  const until = async (condition: () => boolean): Promise<void> => {
    while (!condition())
      await new Promise<void>((resolve) => {
        wake = resolve;
      });
  };
  return { known, lines, until };
}

function register(etcd: Etcd, key: string, ping = () => PINGS.get(key)!) {
  const lines: string[] = [];
  let wake = () => {};
  const write = (line: string) => {
    lines.push((JSON.parse(line) as { msg: string }).msg);
    wake();
  };
  const log = pino({}, { write });
  const registration = new EtcdRegistration({ etcd, key, ping, log });
  closing.push(() => registration.close());
  const said = async (pattern: RegExp): Promise<void> => {
    while (!lines.some((line) => pattern.test(line)))
      await new Promise<void>((resolve) => {
        wake = resolve;
      });
  };
  return { registration, said };
}

const PINGS = new Map(['a:1', 'b:2'].map((key) => [key, Buffer.from(key)]));

describe.skipIf(NO_ETCD)('with etcd (skipped without it: Debian package etcd-server)', () => {
  async function start() {
    const server = await EtcdServer.start(join(DIR, `${folders++}`));
    closing.push(() => server.kill());
    const address = { endpoints: [server.address], secure: false, prefix: 'fleet/' };
    return { server, etcd: () => new Etcd(address) };
  }

  it('an instance is known while its lease lives, and leaves when it says so', async () => {
    const { server, etcd } = await start();
    const first = register(etcd(), 'a:1');
    await first.said(/registered with etcd/);
    const { known, until } = follow(etcd());
    await until(() => known.has('a:1'));
    const { registration } = register(etcd(), 'b:2');
    await until(() => known.has('b:2'));
    // Announced again and again, as pings are.
    await until(() => known.get('a:1')! > 2);
    await registration.close();
    await until(() => !known.has('b:2'));
    expect([...known.keys()]).toEqual(['a:1']);
    // A lease that ends takes the key with it.
    const { ID } = (await server.call('lease/grant', { TTL: 1 })) as { ID: string };
    const base64 = (text: string) => Buffer.from(text).toString('base64');
    await server.call('kv/put', { key: base64('fleet/c:3'), value: base64('c:3'), lease: ID });
    await until(() => known.has('c:3'));
    await until(() => !known.has('c:3'));
    // What cannot be used is passed over, and other prefixes are other fleets.
    await server.call('kv/put', { key: base64('fleet/d:4'), value: base64('nonsense') });
    await server.call('kv/put', { key: base64('fleets/e:5'), value: base64('e:5') });
    await server.call('kv/put', { key: base64('fleet/f:6'), value: base64('f:6') });
    await until(() => known.has('f:6'));
    expect([...known.keys()]).toEqual(['a:1', 'f:6']);
  });

  it('killed and back, its history compacted: nobody is lost, nothing is restarted, and news goes on', async () => {
    const { server, etcd } = await start();
    const { known, lines, until } = follow(etcd());
    const { said } = register(etcd(), 'a:1');
    await until(() => known.has('a:1'));
    await server.kill();
    await until(() => lines.some((line) => /is kept; trying again/.test(line)));
    await said(/not registered: etcd at .* Trying again/);
    const before = known.get('a:1')!;
    await until(() => known.get('a:1')! > before);
    await server.start();
    await server.compact();
    await until(() => lines.filter((line) => line.startsWith('instances are read from')).length === 2);
    register(etcd(), 'b:2');
    await until(() => known.has('b:2'));
    expect([...known.keys()]).toEqual(['a:1', 'b:2']);
  });

  it('with its data lost, instances register anew by themselves', async () => {
    const { server, etcd } = await start();
    const { said } = register(etcd(), 'a:1');
    await said(/registered with etcd/);
    await server.kill();
    const other = await start();
    const proxied = createTcpServer((socket) => pipe(socket, other.server.address.port));
    await new Promise<void>((resolve) => proxied.listen(server.address.port, '127.0.0.1', resolve));
    closing.push(async () => proxied.close());
    const { known, until } = follow(other.etcd());
    await until(() => known.has('a:1'));
  });

  it('one that asks for a user: with the password, while tokens end and it is restarted; without, it is told why', async () => {
    const server = await EtcdServer.start(join(DIR, `${folders++}`), ['--auth-token-ttl', '1']);
    closing.push(() => server.kill());
    await server.askForUsers('fleet', 'p@ss:w/rd', 'fleet/');
    const as = (user: string) =>
      new Etcd(parseEtcdAddress(`etcd://${user}@${formatHostPort(server.address)}/fleet`));
    const right = encodeURIComponent('p@ss:w/rd');
    const { said } = register(as(`fleet:${right}`), 'a:1');
    await said(/registered with etcd/);
    const { known, lines, until } = follow(as(`fleet:${right}`));
    await until(() => known.has('a:1'));
    const wrong = follow(as('fleet:wr0ng-pass'));
    await wrong.until(() => wrong.lines.length > 0);
    expect(wrong.lines[0]).toMatch(/authenticate as user fleet: status 400: .*invalid user ID or password/);
    const nobody = follow(new Etcd({ endpoints: [server.address], secure: false, prefix: 'fleet/' }));
    await nobody.until(() => nobody.lines.length > 0);
    expect(nobody.lines[0]).toMatch(/user name is empty/);
    const elsewhere = follow(
      new Etcd(parseEtcdAddress(`etcd://fleet:${right}@${formatHostPort(server.address)}/other`)),
    );
    await elsewhere.until(() => elsewhere.lines.length > 0);
    expect(elsewhere.lines[0]).toMatch(/permission denied/);
    // A restart takes every token with it; so does time, of which the lease needs some.
    await server.kill();
    await until(() => lines.some((line) => /is kept; trying again/.test(line)));
    await server.start();
    await until(() => lines.filter((line) => line.startsWith('instances are read from')).length === 2);
    register(as(`fleet:${right}`), 'b:2');
    await until(() => known.has('b:2'));
    expect([...known.keys()]).toEqual(['a:1', 'b:2']);
    for (const said of [...lines, ...wrong.lines, ...elsewhere.lines])
      expect(said).not.toMatch(/p@ss|p%40ss|wr0ng/);
  });

  it('of several endpoints, one that is away or hangs holds up nothing', async () => {
    const { server } = await start();
    const hanging = createTcpServer((socket) => void socket.on('error', () => {}));
    await new Promise<void>((resolve) => hanging.listen(0, '127.0.0.1', resolve));
    closing.push(async () => hanging.close());
    const { port } = hanging.address() as AddressInfo;
    const endpoints = [{ host: '127.0.0.1', port: 1 }, { host: '127.0.0.1', port }, server.address];
    const etcd = () => new Etcd({ endpoints, secure: false, prefix: 'fleet/' });
    register(etcd(), 'a:1');
    const { known, until } = follow(etcd());
    await until(() => known.has('a:1'));
  });
});

describe('what is no etcd', () => {
  async function lying(answer: (path: string, out: ServerResponse) => void): Promise<Etcd> {
    const server = createServer((request, out) => answer(request.url ?? '', out));
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    closing.push(async () => {
      server.close();
      server.closeAllConnections();
    });
    const { port } = server.address() as AddressInfo;
    return new Etcd({ endpoints: [{ host: '127.0.0.1', port }], secure: false, prefix: 'fleet/' });
  }

  it.each<[string, (path: string, out: ServerResponse) => void, RegExp]>([
    ['answers with errors', (_, out) => out.writeHead(500).end(), /status 500/],
    ['answers with text', (_, out) => out.end('hello'), /is not JSON/],
    ['answers in another form', (_, out) => out.end('{"header":{"revision":{}}}'), /another form/],
    ['answers without end', (_, out) => flood(out), /more than 16777216 bytes/],
    [
      'watches without end',
      (path, out) => {
        if (!path.endsWith('watch')) return void out.end('{"header":{"revision":"1"}}');
        flood(out);
      },
      /a line of more than 16777216 bytes/,
    ],
  ])('one that %s is told, and tried again', async (_, answer, message) => {
    const { lines, until } = follow(await lying(answer));
    await until(() => lines.some((line) => message.test(line)));
  });
});

describe.skipIf(NO_ETCD)('a fleet that knows itself by etcd alone', () => {
  it('serves through both proxies, while etcd is killed and comes back, and after a proxy has died', async () => {
    const server = await EtcdServer.start(join(DIR, `${folders++}`));
    closing.push(() => server.kill());
    const registry = ['--registry', `etcd://${formatHostPort(server.address)}/fleet`];
    const proxies = await Promise.all([startProxy(registry), startProxy(registry)]);
    const workers = await startWorkers((role) => startWorker(role, undefined, registry));
    for (const { program } of [...proxies, ...workers]) closing.push(() => program.stop());
    for (const proxy of proxies) await untilListed(proxy, 2, 2);
    const clients = load(proxies);
    await server.kill();
    await proxies[0]!.program.line(/is kept; trying again/);
    await proxies[1]!.program.line(/is kept; trying again/);
    await server.start();
    await server.compact();
    for (const proxy of proxies) expect(await countsOf(proxy)).toEqual({ producer: 2, consumer: 2 });
    await proxies[0]!.program.stop('SIGKILL');
    await clients.more(2);
    await clients.end();
    // A worker that ends leaves at once; a killed one when its lease ends.
    await workers[0]!.program.stop();
    await proxies[1]!.program.line(/Remove .*it has left etcd/);
    expect(await countsOf(proxies[1]!)).toEqual({ producer: 1, consumer: 2 });
    expect(await askThrough([proxies[1]!])).toMatch(RIGHT);
  });
});

const BOMB = Buffer.alloc(2 ** 20, 'x');

/** Bytes without end, for as long as somebody reads. */
function flood(out: ServerResponse): void {
  if (out.destroyed) return;
  if (out.write(BOMB)) setImmediate(flood, out);
  else out.once('drain', () => flood(out));
}

function pipe(socket: Socket, port: number): void {
  const to = connect(port, '127.0.0.1');
  for (const one of [socket, to]) one.on('error', () => {});
  socket.pipe(to).pipe(socket);
}
