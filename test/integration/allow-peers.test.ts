/** Real sockets against the gate of `--allow-peers`: who is let in, who is not, and what the operator gets to see. */
import { networkInterfaces } from 'node:os';
import { afterEach, describe, expect, test } from 'vitest';
import * as zmq from 'zeromq';
import { AllowList } from '../../src/net/allow-list.ts';
import { ZapGate } from '../../src/net/zap.ts';
import type { Logger } from '../../src/observability/log.ts';

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
  const socket = new zmq.Dealer({ linger: 0, ipv6: true, immediate: true, reconnectInterval: 5 });
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
  test('lets in who is listed; a stranger never gets a message through, however often it tries', async () => {
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
