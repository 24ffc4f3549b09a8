/** How bytes come from a producer: by direct where both offer it, else by a pair, with the reason. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { createLogger } from '../../../../src/observability/log.ts';
import { MetricsPage, readMetric } from '../../../../src/observability/metrics.ts';
import type { NativeInit } from '../../../../src/transfer/native/channel.ts';
import { Connections } from '../../../../src/transfer/native/connections.ts';
import type { DirectWays } from '../../../../src/transfer/native/direct.ts';
import type { HelloMessage, NativeTransport, Nonce } from '../../../../src/transfer/native/messages.ts';
import type { OwnerPage } from '../../../../src/transport/direct/page.ts';

const PEER = '10.0.0.1:8082';
const THEIRS = 'p'.repeat(32) as Nonce;
const SHAPE = { blocks: 8, blockSize: 4, layers: 1, blockBytes: 64, family: 'kv-first' } as const;

type Served = Parameters<DirectWays['serve']>[0];

function start(transports: readonly NativeTransport[] = ['direct', 'nccl']) {
  const init: NativeInit = {
    nonce: 'c'.repeat(32) as Nonce,
    layers: [],
    shape: SHAPE,
    transports,
    ...(transports.includes('direct') && { direct: { bootId: 'here', path: '/run/ours' } }),
  };
  const told: string[] = [];
  let served: Served | undefined;
  let page: OwnerPage | undefined;
  const connected: string[] = [];
  const connections = new Connections({
    init,
    role: 'consumer',
    direct: {
      serve: (events) => {
        served = events;
      },
      pageOf: () => page,
      expect: () => {},
      connect: (peer, _, path) => connected.push(`${peer} ${path}`),
      mappings: () => [],
    },
    log: createLogger({ level: 'silent', format: 'json' }, 'test'),
    on: {
      ready: (peer) => told.push(`ready ${peer}`),
      useless: (_, { code, message }) => told.push(`${code} ${message}`),
      died: (peer) => told.push(`died ${peer}`),
      idle: () => true,
    },
  });
  const gauge = (reason: 'off' | 'peer_off' | 'other_host' | 'refused' | 'late') => {
    const metrics = new MetricsPage();
    connections.measure(metrics);
    return readMetric([metrics], 'pd_native_fallbacks', reason);
  };
  return {
    connections,
    told,
    connected,
    gauge,
    served: () => served!,
    setPage: (to: OwnerPage) => (page = to),
  };
}

const hello = (given: Partial<HelloMessage> = {}): HelloMessage => ({
  cmd: 'HELLO',
  from: THEIRS,
  hello: { version: 1, features: ['native'], sendType: 'PUT_ASYNC' },
  cache: SHAPE,
  transports: ['direct', 'nccl'],
  direct: { bootId: 'here', path: '/run/theirs' },
  ...given,
});

describe('the way of a producer’s bytes', () => {
  beforeEach(() => {
    vi.useFakeTimers();
  });
  afterEach(() => {
    vi.useRealTimers();
  });

  it('is direct once it has mapped our cache, and nothing is asked of it before', () => {
    const { connections, told, served, gauge } = start();
    connections.met(PEER, hello());
    expect(connections.ready(PEER)).toBeUndefined();
    served().open(THEIRS);
    expect(connections.ready(PEER)?.transport).toBe('direct');
    expect(told).toEqual([`ready ${PEER}`]);
    vi.advanceTimersByTime(60_000);
    expect(connections.ready(PEER)?.transport).toBe('direct');
    expect(gauge('late')).toBe(0);
  });

  it('is nccl where direct is refused, and the gauge and the state say why', () => {
    const { connections, served, gauge } = start();
    connections.met(PEER, hello());
    served().refused(THEIRS, 'its memory cannot be mapped');
    expect(connections.ready(PEER)?.transport).toBe('nccl');
    expect(gauge('refused')).toBe(1);
    expect(connections.states()).toEqual([
      {
        peer: PEER,
        transport: 'nccl',
        fallback: { reason: 'refused', why: 'its memory cannot be mapped' },
      },
    ]);
  });

  it('is nccl where nobody maps our cache in time', () => {
    const { connections, gauge } = start();
    connections.met(PEER, hello());
    vi.advanceTimersByTime(5_000);
    expect(connections.ready(PEER)?.transport).toBe('nccl');
    expect(gauge('late')).toBe(1);
  });

  it.each([
    ['other_host', ['direct', 'nccl'], { direct: { bootId: 'there', path: '/run/theirs' } }],
    ['peer_off', ['direct', 'nccl'], { transports: ['nccl'] }],
    ['off', ['nccl'], {}],
  ] as const)('is nccl at once, by the weaker of two settings or hosts: %s', (reason, ours, theirs) => {
    const { connections, gauge } = start(ours);
    connections.met(PEER, hello(theirs as Partial<HelloMessage>));
    expect(connections.ready(PEER)?.transport).toBe('nccl');
    expect(gauge(reason)).toBe(1);
    connections.lost(PEER);
    expect(gauge(reason)).toBe(0);
  });

  it('is none where direct is refused and no other is common, by name', () => {
    const { connections, told, served } = start(['direct']);
    connections.met(PEER, hello());
    served().refused(THEIRS, 'another user');
    expect(connections.ready(PEER)).toBeUndefined();
    expect(told).toEqual([expect.stringMatching(/^TRANSPORT_MISMATCH .*another user.*10\.0\.0\.1:8082/)]);
  });

  it('is direct at once where that process has our cache mapped already', () => {
    const { connections, setPage } = start();
    setPage({} as OwnerPage);
    connections.met(PEER, hello());
    expect(connections.ready(PEER)?.transport).toBe('direct');
  });

  it('is nothing where its link has ended, though its connection goes on', () => {
    const { connections, told, served } = start();
    connections.met(PEER, hello());
    served().open(THEIRS);
    served().died(THEIRS);
    expect(told.slice(1)).toEqual([`died ${PEER}`, expect.stringMatching(/^PEER_LOST /)]);

    const again = start();
    again.connections.met(PEER, hello());
    again.served().open(THEIRS);
    again.connections.lost(PEER);
    again.connections.met(PEER, hello({ from: 'q'.repeat(32) as Nonce }));
    again.served().died(THEIRS);
    expect(again.told.slice(1)).toEqual([`died ${PEER}`]);
  });

  it('of a consumer is tried where it offers direct on this host, and it is known to be dead by its socket alone', () => {
    const { connections, connected, told, served } = start();
    connections.admitted(PEER, hello({ direct: { bootId: 'there', path: '/run/theirs' } }));
    expect(connected).toEqual([]);
    connections.admitted(PEER, hello());
    expect(connected).toEqual([`${PEER} /run/theirs`]);
    served().died(THEIRS);
    served().died(THEIRS);
    expect(told).toEqual([`died ${PEER}`]);
  });
});
