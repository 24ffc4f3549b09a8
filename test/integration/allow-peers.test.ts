/** Real sockets against the gate of `--allow-peers`: who is let in, who is not, and what the operator gets to see. */
import { connect } from 'node:net';
import { networkInterfaces } from 'node:os';
import { afterEach, describe, expect, test } from 'vitest';
import * as zmq from 'zeromq';
import { deferred } from '../../src/deferred.ts';
import { formatHostPort } from '../../src/net/address.ts';
import { AllowList } from '../../src/net/allow-list.ts';
import { ZapGate } from '../../src/net/zap.ts';
import { createLogger, type Logger } from '../../src/observability/log.ts';
import { Discovery } from '../../src/proxy/discovery.ts';
import { InstanceRegistry } from '../../src/proxy/registry.ts';
import { HostTransport } from '../../src/transport/host/transport.ts';
import { decodeUniqueId } from '../../src/transport/host/unique-id.ts';
import { encodePing } from '../../src/wire/codec.ts';
import { count, flat, Services, send, until } from '../support/transfer.ts';

const silent = createLogger({ level: 'silent', format: 'json' }, 'test');

const hasIpv6 = Object.values(networkInterfaces()).some((list) =>
  list?.some(({ address }) => address === '::1'),
);

const opened: { close(): unknown }[] = [];
afterEach(async () => {
  for (const one of opened.splice(0).reverse()) await one.close();
});

interface Guarded {
  readonly gate: ZapGate;
  readonly endpoint: string;
  readonly warnings: string[];
  /** Resolves at the n-th refusal. */
  refusals(count: number): Promise<void>;
}

async function guarded(bind: string, allow: string[]): Promise<Guarded> {
  const warnings: string[] = [];
  const waiting: { count: number; resolve: () => void }[] = [];
  const log = { warn: (_: object, text: string) => warnings.push(text) } as unknown as Logger;
  const gate = await ZapGate.open({
    allow: AllowList.parse(allow),
    what: 'KV listener',
    log,
    onRefused: () => {
      for (const { count, resolve } of waiting) if (gate.refused >= count) resolve();
    },
  });
  opened.push(gate);
  const router = new zmq.Router({ linger: 0, ipv6: true, handover: true, ...gate.socketOptions });
  opened.push(router);
  await router.bind(`tcp://${bind}:*`);
  void echo(router);
  return {
    gate,
    endpoint: router.lastEndpoint!,
    warnings,
    refusals: (count) =>
      new Promise((resolve) => {
        waiting.push({ count, resolve });
        if (gate.refused >= count) resolve();
      }),
  };
}

async function echo(router: zmq.Router): Promise<void> {
  for await (const frames of router) await router.send(frames);
}

function dealer(endpoint: string, from?: string): zmq.Dealer {
  // From elsewhere it is a stranger, who would come again where its connection ends before it reads why.
  const reconnectInterval = from === undefined ? 5 : -1;
  const socket = new zmq.Dealer({ linger: 0, ipv6: true, immediate: true, reconnectInterval });
  opened.push(socket);
  const port = endpoint.slice('tcp://'.length);
  socket.connect(from === undefined ? endpoint : `tcp://${from}:0;${port}`);
  return socket;
}

async function roundTrip(socket: zmq.Dealer): Promise<string> {
  await socket.send('ping');
  const [answer] = await socket.receive();
  return String(answer);
}

describe('--allow-peers', () => {
  test('lets in who is listed; strangers never get a message through', async () => {
    const { gate, endpoint, warnings, refusals } = await guarded('0.0.0.0', ['127.0.0.1']);
    const port = endpoint.split(':').at(-1)!;
    let answered = false;
    const strangers = [1, 2, 3].map(() => dealer(`tcp://127.0.0.1:${port}`, '127.0.0.2'));
    for (const stranger of strangers) {
      void roundTrip(stranger).then(
        () => {
          answered = true;
        },
        () => {},
      );
    }
    await refusals(3);
    expect(await roundTrip(dealer(`tcp://127.0.0.1:${port}`))).toBe('ping');
    expect(gate.refused).toBe(3);
    expect(answered).toBe(false);
    // many refusals, one line
    expect(warnings).toEqual([
      'KV listener: connection from 127.0.0.2 refused, it is not in --allow-peers (127.0.0.1)',
    ]);
  });

  test.skipIf(!hasIpv6)('works on ::1 and for IPv4 peers of a dual-stack socket', async () => {
    const v6 = await guarded('[::1]', ['::1']);
    expect(await roundTrip(dealer(v6.endpoint))).toBe('ping');
    expect(v6.gate.refused).toBe(0);
    const dual = await guarded('[::]', ['127.0.0.0/8']);
    const port = dual.endpoint.split(':').at(-1)!;
    expect(await roundTrip(dealer(`tcp://127.0.0.1:${port}`))).toBe('ping');
    const stranger = dealer(`tcp://[::1]:${port}`);
    stranger.sendTimeout = 1_000;
    void stranger.send('ping').catch(() => {});
    await dual.refusals(1);
    expect(dual.warnings[0]).toContain('connection from ::1 refused');
  });

  test('two gates in one process keep to their own lists', async () => {
    const open = await guarded('127.0.0.1', ['127.0.0.0/8']);
    const shut = await guarded('127.0.0.1', ['10.0.0.0/8']);
    void dealer(shut.endpoint);
    await shut.refusals(1);
    expect(await roundTrip(dealer(open.endpoint))).toBe('ping');
    expect(open.gate.refused).toBe(0);
  });
});

describe('an engine with --allow-peers', () => {
  const services = new Services();
  afterEach(() => services.dispose());

  test('serves who is listed; others reach neither its listener nor its data port, and are counted', async () => {
    const consumer = await services.make({ allowPeers: ['127.0.0.1'] });
    const producer = await services.make({ allowPeers: ['127.0.0.0/8'] });
    await send(producer, flat('cmpl-a-0#l', 1_000, consumer.address)).sent;
    expect(count(consumer, 'pd_peers_refused_total')).toBe(0);

    const stranger = dealer(`tcp://${formatHostPort(consumer.address)}`, '127.0.0.2');
    void stranger.send('anything').catch(() => {});
    await until('the refusal', () => count(consumer, 'pd_peers_refused_total') === 1);
    expect(count(consumer, 'pd_protocol_errors_total', 'malformed')).toBe(0);
    expect(consumer.state().tensors).toBe(1);

    const transport = await HostTransport.create({
      bindHost: '0.0.0.0',
      announceHost: '127.0.0.1',
      guard: { allow: AllowList.parse(['127.0.0.1']), log: silent, onRefused: () => refused.push('data') },
    });
    services.add(transport);
    const refused: string[] = [];
    const { address } = decodeUniqueId(transport.createUniqueId(), 'test');
    const socket = connect({ host: '127.0.0.1', port: address.port, localAddress: '127.0.0.2' });
    await new Promise((resolve) => socket.once('close', resolve));
    expect(refused).toEqual(['data']);
    expect(socket.bytesRead).toBe(0);
  });

  test('a proxy with --allow-instances takes pings of those alone', async () => {
    const registry = new InstanceRegistry(10_000);
    let bad = 0;
    const added = deferred<void>();
    const discovery = await Discovery.start({
      bind: { host: '0.0.0.0', port: 0 },
      registry,
      log: silent,
      sweepMs: 1_000,
      allow: ['127.0.0.1'],
      onBadPing: () => bad++,
      onChange: () => added.resolve(),
    });
    services.add({ dispose: () => discovery.close() });
    const endpoint = `tcp://127.0.0.1:${discovery.address.port}`;
    const ping = (port: number) =>
      encodePing({ type: 'P', http_address: `127.0.0.1:${port}`, zmq_address: `127.0.0.1:${port + 1}` });
    const stranger = dealer(endpoint, '127.0.0.2');
    void stranger.send(ping(1)).catch(() => {});
    await until('the refusal', () => bad === 1);
    await dealer(endpoint).send(ping(11));
    await added.promise;
    expect(registry.list().map(({ httpAddress }) => httpAddress)).toEqual(['127.0.0.1:11']);
  });
});
