import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import type { EventRef } from '../../../../src/device/device.ts';
import { createLogger } from '../../../../src/observability/log.ts';
import { MetricsPage } from '../../../../src/observability/metrics.ts';
import type { FromWire, ToWire } from '../../../../src/transfer/native/channel.ts';
import { HandOver } from '../../../../src/transfer/native/hand-over.ts';
import type { HelloMessage, Nonce, Ticket, WantMessage } from '../../../../src/transfer/native/messages.ts';
import { proxyRequestId, transferIdOf } from '../../../../src/wire/ids.ts';

const SHAPE = { blocks: 8, blockSize: 4, layers: 4, blockBytes: 16, family: 'kv-first' } as const;
const [PRODUCER, CONSUMER] = ['1'.repeat(32) as Nonce, '2'.repeat(32) as Nonce];
const PEER = '127.0.0.1:2';
const ID = transferIdOf(
  `cmpl-${proxyRequestId({ host: '127.0.0.1', port: 1 }, { host: '127.0.0.1', port: 2 }, 'u')}-0`,
);

const WANT: WantMessage = {
  cmd: 'WANT',
  from: CONSUMER,
  to: PRODUCER,
  seq: 1,
  floor: 1,
  ticket: '3'.repeat(32) as Ticket,
  id: ID,
  transport: 'nccl',
  promptDigest: 'p',
  samplingDigest: 's',
  tokens: 8,
  skip: 0,
  blocks: [5, 6],
};

// A hand-over that still waits for something looks at its clock again and again: that ends with the test.
beforeEach(() => void vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] }));
afterEach(() => void vi.useRealTimers());

/** A producer that a consumer has said hello to, and what its wire is told. */
function producer() {
  const told: ToWire[] = [];
  let hear: (event: FromWire) => void = () => {};
  const handOver = new HandOver({
    init: { nonce: PRODUCER, layers: [], shape: SHAPE, transports: ['nccl'] },
    wire: (listener) => {
      hear = listener;
      return (command) => told.push(command);
    },
    role: 'producer',
    rank: 0,
    leaseMs: 60_000,
    busy: () => false,
    log: createLogger({ level: 'silent', format: 'json' }, 'test'),
    metrics: new MetricsPage(),
  });
  const nothing = () => {};
  const books = {
    ...{ hold: nothing, unhold: nothing, expose: nothing },
    ...{ retract: nothing, lease: nothing, endLease: nothing },
  };
  handOver.serve({ books, loadEnded: nothing, freed: nothing });
  const hello = { cmd: 'HELLO', from: CONSUMER, cache: SHAPE, transports: ['nccl'] } as const;
  hear({
    kind: 'introduced',
    way: 'from',
    peer: PEER,
    hello: { ...hello, hello: {} as HelloMessage['hello'] },
  });
  const want = () => hear({ kind: 'asked', peer: PEER, message: WANT });
  const writes = () =>
    told.flatMap((command) =>
      command.kind === 'write'
        ? [[command.part.layer, command.part.layers, command.ready?.event] as const]
        : [],
    );
  return { handOver, want, writes, told, hear };
}

const event = (handle: bigint): EventRef => ({ kind: 'cuda', handle });

test('a WANT that comes when its step is enqueued already has each layer written behind its own event', () => {
  const { handOver, want, writes } = producer();
  const events = [1n, 2n, 3n, 4n].map(event);
  handOver.begin({ transferId: ID, promptDigest: 'p', tokens: 8 });
  handOver.progress(ID, 8, [1, 2]);
  for (let layer = 0; layer < 3; layer++) handOver.layer(layer, events[layer]);
  want();
  expect(writes()).toEqual([0, 1, 2].map((layer) => [layer, 1, events[layer]]));
  handOver.layer(3, events[3]);
  expect(writes().at(-1)).toEqual([3, 1, events[3]]);
});

test('layers that are computed at one moment are written together', () => {
  const { handOver, want, writes } = producer();
  const graph = event(1n);
  handOver.begin({ transferId: ID, promptDigest: 'p', tokens: 8 });
  handOver.progress(ID, 8, [1, 2]);
  for (let layer = 0; layer < 4; layer++) handOver.layer(layer, graph);
  want();
  expect(writes()).toEqual([[0, 4, graph]]);
});

test('DONE follows a part that is on its way, and a worker that stops waits until it is sent', async () => {
  const { handOver, want, told, hear } = producer();
  const ends = () => told.filter(({ kind }) => kind === 'answer');
  handOver.begin({ transferId: ID, promptDigest: 'p', tokens: 8 });
  handOver.progress(ID, 8, [1, 2]);
  await handOver.stepEnded();
  want();
  handOver.finish(ID, { tokens: [3], samplingDigest: 's' });
  expect(ends()).toEqual([]);
  const write = told.find((command) => command.kind === 'write');
  hear({ kind: 'written', launch: write?.launch ?? 0, leaving: true });
  expect(ends()).toMatchObject([{ message: { cmd: 'DONE', seq: 1, drawn: [3] } }]);
  const { from, to, seq, ticket } = WANT;
  hear({ kind: 'asked', peer: PEER, message: { cmd: 'ACK', from, to, seq, ticket, floor: 2 } });
  let closed = false;
  const closing = handOver.close().then(() => {
    closed = true;
  });
  await new Promise((resolve) => setImmediate(resolve));
  expect(closed).toBe(false);
  hear({ kind: 'sent' });
  await closing;
});
