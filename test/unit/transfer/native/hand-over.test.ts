/** The hand-over on the core thread beside a wire that the test plays. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { createLogger } from '../../../../src/observability/log.ts';
import { MetricsPage } from '../../../../src/observability/metrics.ts';
import type { FromWire, NativeInit, ToWire } from '../../../../src/transfer/native/channel.ts';
import { HandOver } from '../../../../src/transfer/native/hand-over.ts';
import type { LoadOutcome } from '../../../../src/transfer/native/hand-over-api.ts';
import type { HelloMessage, Nonce } from '../../../../src/transfer/native/messages.ts';
import {
  type EngineRequestId,
  proxyRequestId,
  type TransferId,
  transferIdOf,
} from '../../../../src/wire/ids.ts';

const PRODUCER = { host: '10.0.0.1', port: 8_082 };
const CONSUMER = { host: '10.0.0.2', port: 8_084 };
const PEER = '10.0.0.1:8082';
const SHAPE = { blocks: 8, blockSize: 4, layers: 1, blockBytes: 64, family: 'kv-first' } as const;

let serial = 0;
const newId = (): TransferId =>
  transferIdOf(`cmpl-${proxyRequestId(PRODUCER, CONSUMER, (serial++).toString(16).padStart(32, '0'))}-0`);

function start(role: 'producer' | 'consumer') {
  const init: NativeInit = {
    nonce: 'c'.repeat(32) as Nonce,
    layers: [],
    shape: SHAPE,
    transports: ['nccl'],
  };
  const said: ToWire[] = [];
  const outcomes: LoadOutcome[] = [];
  let hear: (event: FromWire) => void = () => {};
  const handOver = new HandOver({
    init,
    wire: (listener) => {
      hear = listener;
      return (command) => said.push(command);
    },
    role,
    rank: 0,
    leaseMs: 60_000,
    busy: () => false,
    metrics: new MetricsPage(),
    log: createLogger({ level: 'silent', format: 'json' }, 'test'),
  });
  const nothing = () => {};
  handOver.serve({
    books: {
      hold: nothing,
      unhold: nothing,
      expose: nothing,
      retract: nothing,
      lease: nothing,
      endLease: nothing,
    },
    loadEnded: (outcome) => outcomes.push(outcome),
    freed: nothing,
  });
  const want = (withinMs = 30_000) => {
    const transferId = newId();
    handOver.want({
      requestId: `${transferId}-0` as EngineRequestId,
      transferId,
      peer: PEER,
      promptDigest: 'prompt',
      samplingDigest: 'sampling',
      tokens: 4,
      skip: 0,
      blocks: [3],
      withinMs,
    });
  };
  return { handOver, said, outcomes, want, hear: (event: FromWire) => hear(event) };
}

const hello: HelloMessage = {
  cmd: 'HELLO',
  from: 'p'.repeat(32) as Nonce,
  hello: { version: 1, features: ['native'], sendType: 'PUT_ASYNC' },
  cache: SHAPE,
  transports: ['nccl'],
};
const introduced: FromWire = { kind: 'introduced', way: 'to', peer: PEER, hello };
const lost: FromWire = {
  kind: 'lost',
  way: 'to',
  peer: PEER,
  error: { code: 'PEER_LOST', message: 'gone', context: {} },
};
const kinds = (said: readonly ToWire[]) =>
  said.map((command) => (command.kind === 'ask' ? command.message.cmd : command.kind));

describe('a hand-over', () => {
  beforeEach(() => {
    vi.useFakeTimers();
  });
  afterEach(() => {
    vi.useRealTimers();
  });

  it('closes within seconds beside a producer that never says a word', async () => {
    const { handOver, outcomes, want, hear } = start('consumer');
    want();
    hear(introduced);
    let closed = false;
    const closing = handOver.close().then(() => {
      closed = true;
    });
    expect(outcomes).toMatchObject([{ ok: false, error: { code: 'REQUEST_ABORTED' } }]);
    await vi.advanceTimersByTimeAsync(2_900);
    expect(closed).toBe(false);
    await vi.advanceTimersByTimeAsync(200);
    await closing;
    // and nothing keeps its thread
    expect(vi.getTimerCount()).toBe(0);
  });

  it('asks again on the next connection what met the end of one, once, within its deadline', async () => {
    const { said, outcomes, want, hear } = start('consumer');
    want();
    hear(introduced);
    want();
    expect(kinds(said)).toEqual(['connect', 'WANT', 'WANT']);
    hear(lost);
    expect(outcomes).toEqual([]);
    expect(kinds(said).slice(3)).toEqual(['connect', 'connect']);
    hear(introduced);
    expect(kinds(said).slice(5)).toEqual(['WANT', 'WANT']);
    hear(lost);
    expect(outcomes).toMatchObject([
      { ok: false, error: { cause: { code: 'PEER_LOST' } } },
      { ok: false, error: { cause: { code: 'PEER_LOST' } } },
    ]);
  });

  it('fails at once what waits for a peer that cannot be connected', () => {
    const { outcomes, want, hear } = start('consumer');
    want();
    hear(lost);
    expect(outcomes).toMatchObject([{ ok: false }]);
  });

  it('asks a consumer that has said nothing whether it speaks natively, and forgets KV that it will not want', async () => {
    const { handOver, said, hear } = start('producer');
    const compute = () => {
      const id = newId();
      handOver.begin({ transferId: id, promptDigest: 'prompt', tokens: 4 });
      handOver.progress(id, 4, [2]);
      handOver.finish(id, { tokens: [5], samplingDigest: 'sampling' });
      return id;
    };
    const id = compute();
    const peer = '10.0.0.2:8084';
    expect(said).toEqual([{ kind: 'probe', peer, id }]);
    compute();
    expect(said).toHaveLength(1);
    expect(handOver.state().grants.leases).toBe(2);
    const error = { code: 'TRANSPORT_MISMATCH', message: 'frozen', context: {} } as const;
    hear({ kind: 'unwilling', peer, id, error });
    expect(handOver.state().grants.leases).toBe(1);
    compute();
    expect(said).toHaveLength(2);
    hear({ kind: 'introduced', way: 'from', peer, hello });
    compute();
    expect(said).toHaveLength(2);
    const closing = handOver.close();
    await vi.advanceTimersByTimeAsync(3_100);
    await closing;
  });
});
