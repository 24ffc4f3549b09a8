/** Pings as a proxy sees them: from the engine's own address, again after it was away, and never a stale one. */
import { createServer as createHttpServer } from 'node:http';
import { type AddressInfo, createServer } from 'node:net';
import pino from 'pino';
import { afterEach, describe, expect, it, vi } from 'vitest';
import * as zmq from 'zeromq';
import { proxyConfig } from '../../src/config/proxy-config.ts';
import { PdError } from '../../src/errors.ts';
import { formatHostPort } from '../../src/net/address.ts';
import { RateLimitedLog } from '../../src/observability/log.ts';
import { PdProxy } from '../../src/proxy/proxy.ts';
import { Announcer } from '../../src/transfer/announcer.ts';
import { Deadlines } from '../../src/transfer/deadlines.ts';
import { OnBehalf } from '../../src/transfer/on-behalf.ts';
import { decodePing } from '../../src/wire/codec.ts';
import { fingerprint } from '../../src/wire/fingerprint.ts';
import { keptPort, Services, transferOptions } from '../support/transfer.ts';

const services = new Services();
const CONTEXT = {
  options: transferOptions(),
  self: '127.0.0.1:1',
  deadlines: new Deadlines(),
  limited: new RateLimitedLog(0),
};
afterEach(async () => {
  await services.dispose();
  vi.useRealTimers();
});

async function proxy(port = 0): Promise<{ socket: zmq.Router; port: number }> {
  const socket = new zmq.Router({ linger: 0, handover: true });
  await socket.bind(`tcp://127.0.0.1:${port === 0 ? '*' : port}`);
  services.add({ dispose: async () => socket.close() });
  return { socket, port: Number(/:(\d+)$/.exec(socket.lastEndpoint!)![1]) };
}

it('come from the KV address, go on after the proxy was away, and stop when told', async () => {
  const first = await proxy(await keptPort());
  const engine = await services.make();
  const ping = {
    proxies: [{ host: '0.0.0.0', port: first.port }],
    type: 'P',
    httpAddress: '127.0.0.1:8081',
  } as const;
  engine.startPing({ ...ping, intervalMs: 30 });
  const [identity, body] = await first.socket.receive();
  expect(identity!.toString()).toBe(formatHostPort(engine.address));
  expect(decodePing(body!)).toEqual({
    type: 'P',
    http_address: '127.0.0.1:8081',
    zmq_address: formatHostPort(engine.address),
  });
  await first.socket.receive();
  const gone = new Promise((resolve) => first.socket.events.on('end', resolve));
  first.socket.close();
  await gone;
  const second = await proxy(first.port);
  await second.socket.receive();
  engine.stopPing();
});

it('go to every address that takes them, of several proxies and of a name that changes', async () => {
  // The first beat comes when the proxies have shaken hands, however long that takes: before, nobody takes pings, which is a warning.
  vi.useFakeTimers({ toFake: ['setInterval', 'clearInterval'] });
  let now = 0;
  const pass = (ms: number) => {
    now += ms;
    vi.advanceTimersByTime(ms);
  };
  const [first, second] = [await proxy(), await proxy()];
  let addresses = ['127.0.0.2', '127.0.0.1'];
  const lookUp = async () => addresses.map((address) => ({ address, family: 4 }));
  const lines: string[] = [];
  const log = pino({ level: 'warn' }, { write: (line: string) => void lines.push(line) });
  const proxies = [
    { host: '127.0.0.1', port: first.port },
    { host: 'proxies.example', port: second.port },
  ];
  const announcer = new Announcer(
    { ...CONTEXT, deadlines: new Deadlines(() => now), log },
    { proxies, type: 'P', httpAddress: '127.0.0.1:8081', intervalMs: 1_000 },
    lookUp,
    700,
  );
  services.add({ dispose: async () => announcer.close() });
  const taken = async ({ socket }: { socket: zmq.Router }) =>
    decodePing((await socket.receive())[1]!).http_address;
  expect(await Promise.all([first, second].map(taken))).toEqual(['127.0.0.1:8081', '127.0.0.1:8081']);
  pass(1_000);
  expect(await Promise.all([first, second].map(taken))).toEqual(['127.0.0.1:8081', '127.0.0.1:8081']);
  // Another proxy comes to the name at another address of this machine.
  const late = new zmq.Router({ linger: 0 });
  await late.bind(`tcp://127.0.0.3:${second.port}`);
  services.add({ dispose: async () => late.close() });
  addresses = ['127.0.0.3'];
  pass(700);
  expect(await taken({ socket: late })).toBe('127.0.0.1:8081');
  pass(300);
  // Who still takes pings gets them, listed or not; nothing that is silent beside others is a warning.
  expect(await taken(second)).toBe('127.0.0.1:8081');
  expect(lines).toEqual([]);
});

it('say the load of the worker as soon as it is told, to a proxy that came before or after', async () => {
  const { socket, port } = await proxy();
  const shape = { blockSize: 16, layers: 1, heads: 1, headDim: 4 };
  const model = fingerprint({ model: 'demo', weights: 'w', dtype: 'float32', ...shape });
  const engine = await services.make({ fingerprint: model });
  const loadOf = async () => decodePing((await socket.receive())[1]!).native?.load;
  const load = { running: 1, waiting: 2, kvUsed: 3, kvBlocks: 4, queuedTokens: 5 };
  engine.reportLoad(load);
  const proxies = [{ host: '127.0.0.1', port }];
  engine.startPing({ proxies, type: 'P', httpAddress: '127.0.0.1:8081', intervalMs: 3_600_000 });
  expect(await loadOf()).toEqual(load);
  engine.reportLoad({ ...load, running: 9 });
  expect(await loadOf()).toEqual({ ...load, running: 9 });
  engine.stopPing();
});

it('to an address that is none leave the engine alive', async () => {
  const engine = await services.make();
  const proxies = [{ host: 'no host', port: 1 }];
  engine.startPing({ proxies, type: 'D', httpAddress: 'x:1', intervalMs: 1_000 });
  expect(engine.state().address).toBe(formatHostPort(engine.address));
});

describe('on behalf of a server', () => {
  it('go out while it is well', async () => {
    const { socket, port } = await proxy();
    let status = 503;
    const server = createHttpServer((_, out) => void out.writeHead(status).end());
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    services.add({ dispose: async () => void server.close() });
    const http = { host: '127.0.0.1', port: (server.address() as AddressInfo).port };
    const lines: string[] = [];
    let wake = () => {};
    const write = (line: string) => {
      lines.push((JSON.parse(line) as { msg: string }).msg);
      wake();
    };
    const said = async (pattern: RegExp): Promise<void> => {
      while (!lines.some((line) => pattern.test(line)))
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
      lines.splice(0, lines.findIndex((line) => pattern.test(line)) + 1);
    };
    const one = new OnBehalf({
      ...{ http, kv: { host: '127.0.0.1', port: 7 }, type: 'P', proxies: [{ host: '127.0.0.1', port }] },
      ...{ intervalMs: 20, log: pino({}, { write }) },
    });
    services.add({ dispose: () => one.close() });
    await said(/is not well yet: GET \/health is answered with status 503/);
    status = 200;
    const [identity, body] = await socket.receive();
    expect(identity!.toString()).toBe('127.0.0.1:7');
    const address = formatHostPort(http);
    expect(decodePing(body!)).toEqual({ type: 'P', http_address: address, zmq_address: '127.0.0.1:7' });
    const left = new Promise((resolve) => socket.events.on('disconnect', resolve));
    status = 500;
    await said(/is not well: .*status 500. It is announced no more until it is/);
    await left;
    // A server without that route is a server.
    status = 404;
    await said(/is well: it is announced with KV at 127.0.0.1:7/);
    const ended = new Promise((resolve) => socket.events.on('disconnect', resolve));
    await said(/first ping sent/);
    await one.close();
    await ended;
  });
});

describe('what is told of a proxy', () => {
  interface Line {
    readonly level: number;
    readonly msg: string;
    readonly reason?: string;
  }

  /** A pinger that beats every 50 ms, and what it logs. */
  function pinging(port: number): { lines: Line[]; said(pattern: RegExp): Promise<Line> } {
    const lines: Line[] = [];
    let wake = () => {};
    const write = (line: string) => {
      lines.push(JSON.parse(line) as Line);
      wake();
    };
    const log = pino({ level: 'debug' }, { write });
    const proxies = [{ host: '127.0.0.1', port }];
    const ping = { proxies, type: 'P', httpAddress: '127.0.0.1:2', intervalMs: 50 } as const;
    const pinger = new Announcer({ ...CONTEXT, log }, ping);
    services.add({ dispose: async () => pinger.close() });
    const said = async (pattern: RegExp): Promise<Line> => {
      for (;;) {
        const line = lines.find(({ msg }) => pattern.test(msg));
        if (line) return line;
        await new Promise<void>((resolve) => {
          wake = resolve;
        });
      }
    };
    return { lines, said };
  }

  const strangers: [what: string, greeting: string | undefined, answer: string | undefined][] = [
    ['an HTTP port', undefined, 'HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n'],
    ['one that speaks first', 'SSH-2.0-OpenSSH_9.2\r\n', undefined],
    ['a process that hangs', undefined, undefined],
  ];
  it.each(strangers)(
    '%s is no proxy: no ping was sent, and once it is said what to look at',
    async (_, greeting, answer) => {
      let connections = 0;
      const server = createServer((socket) => {
        connections++;
        socket.on('error', () => {});
        socket.on('data', () => answer && socket.end(answer));
        if (greeting) socket.write(greeting);
      });
      const port = await new Promise<number>((resolve) =>
        server.listen(0, '127.0.0.1', () => resolve((server.address() as { port: number }).port)),
      );
      services.add({ dispose: async () => void server.close() });
      const { lines, said } = pinging(port);
      const { msg, reason } = await said(/no ZeroMQ listener answers/);
      expect(reason).toBe('stranger');
      expect(msg).toContain('discovery port');
      // Beats go on meanwhile.
      for (const before = connections; answer && connections < before + 3; )
        await new Promise<void>((resolve) => server.once('connection', () => resolve()));
      expect(lines[0]!.msg).toBe(`connecting to proxy 127.0.0.1:${port}`);
      expect(lines.filter((line) => line.reason === 'stranger')).toHaveLength(1);
      expect(lines.filter((line) => /first ping|reached again/.test(line.msg))).toEqual([]);
    },
  );

  it('one that comes late is told to be away, and its first ping as the first', async () => {
    const port = await keptPort();
    const { lines, said } = pinging(port);
    expect((await said(/cannot be reached/)).reason).toBe('nobody');
    const late = await proxy(port);
    await late.socket.receive();
    await said(/^first ping sent to proxy/);
    expect(lines.filter(({ reason }) => reason === 'nobody')).toHaveLength(1);
    expect(lines.filter(({ msg }) => msg.includes('reached again'))).toEqual([]);
    expect(lines[0]!.msg).toMatch(/^connecting to proxy/);
  });

  it('one that turns this address away is told by that, and is reached once it lets it in', async () => {
    const start = (port: number, allowInstances: string[]) =>
      PdProxy.start(
        proxyConfig({
          discovery: { host: '127.0.0.1', port },
          allowInstances,
          drainTimeoutMs: 0,
          log: { level: 'silent', format: 'json' },
        }),
      );
    const port = await keptPort();
    const strict = await start(port, ['10.0.0.0/8']);
    const { said } = pinging(port);
    expect((await said(/--allow-instances/)).reason).toBe('refused');
    await strict.close(0);
    // ZeroMQ gives a port back a moment after its socket is closed.
    let open: PdProxy | undefined;
    while (!open) {
      open = await start(port, ['127.0.0.0/8']).catch((error: unknown) => {
        if (PdError.from(error).code !== 'PORT_IN_USE') throw error;
        return undefined;
      });
    }
    const reopened = open;
    services.add({ dispose: () => reopened.close(0) });
    await said(/^first ping sent to proxy/);
  });
});
