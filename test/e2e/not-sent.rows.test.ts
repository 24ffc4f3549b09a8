/**
 * By the frozen wire: a producer that cannot send its KV says so with its answer, and the consumer computes the prompt, or fails, at once. Its deadline is far
 * longer than the test's.
 */
import { afterEach, describe, expect, test } from 'vitest';
import {
  metricsOf,
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from '../support/cluster.ts';
import { rows } from '../support/rows.ts';

let proxy: ProxyHandle | undefined;
let workers: WorkerHandle[] = [];
afterEach(async () => {
  await Promise.all([...workers, proxy].map((each) => each?.program.stop()));
  workers = [];
  proxy = undefined;
});

const NO_ROOM = ['--kv-buffer-size', '0', '--mem-pool-size-gb', '0'];
/** Bound to another address than it tells: nobody answers there. */
const ELSEWHERE = ['--kv-announce-host', '127.0.0.2'];

interface Row {
  readonly why: string;
  readonly sendType: 'PUT' | 'PUT_ASYNC' | 'GET';
  readonly ofProducer: readonly string[];
  readonly ofConsumer: readonly string[];
  readonly code: string;
}
const UNREACHABLE = {
  why: 'the consumer is not where it says',
  ofProducer: ['--connect-timeout', '500ms'],
  ofConsumer: ELSEWHERE,
  code: 'PEER_UNREACHABLE',
};
const FULL = { ofProducer: NO_ROOM, ofConsumer: [], code: 'KV_BUFFER_FULL' };
const GATHER: Row = { ...FULL, why: 'it has no room to gather it', sendType: 'PUT_ASYNC' };
const KEEP: Row = { ...FULL, why: 'it has no room to keep it', sendType: 'GET' };
const PUT: Row = { ...UNREACHABLE, sendType: 'PUT' };
const PUT_ASYNC: Row = { ...UNREACHABLE, sendType: 'PUT_ASYNC' };

type Case = Row & { readonly policy: 'recompute' | 'fail'; readonly overlap: number };
const RECOMPUTE = { policy: 'recompute', overlap: 4 } as const;
const IN_TURN = { policy: 'recompute', overlap: 0 } as const;
const FAIL = { policy: 'fail', overlap: 4 } as const;

describe('a producer cannot send', () => {
  test.each(
    rows<Case>(
      [{ ...PUT, ...RECOMPUTE }],
      [
        ...[RECOMPUTE, IN_TURN, FAIL].map((how) => ({ ...GATHER, ...how })),
        ...[RECOMPUTE, IN_TURN, FAIL].map((how) => ({ ...KEEP, ...how })),
        ...[IN_TURN, FAIL].map((how) => ({ ...PUT, ...how })),
        ...[RECOMPUTE, IN_TURN, FAIL].map((how) => ({ ...PUT_ASYNC, ...how })),
      ],
    ),
  )('$why ($sendType): $policy, at most $overlap asked at once', async (row) => {
    const { sendType, ofProducer, ofConsumer, code, policy, overlap } = row;
    const started = await startProxy(['--overlap', String(overlap)]);
    proxy = started;
    const common = [
      '--wire',
      'frozen',
      '--send-type',
      sendType,
      '--kv-load-timeout',
      '600s',
      '--kv-load-failure',
      policy,
    ];
    workers = await Promise.all([
      startWorker('producer', started, [...common, ...ofProducer]),
      startWorker('consumer', started, [...common, ...ofConsumer]),
    ]);
    await untilListed(started, 1, 1);
    const response = await fetch(`${started.url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ prompt: 'Hello world', max_tokens: 2, temperature: 0 }),
    });
    const text = await response.text();
    const told = new RegExp(`${code}: the producer could not send it: `);
    if (policy === 'recompute') expect([response.status, text]).toEqual([200, expect.any(String)]);
    else {
      expect(response.status).toBe(502);
      // In GET the consumer may hear it from the producer itself first.
      expect(text).toMatch(
        sendType === 'GET' ? /had no room to keep it|the producer could not send it: / : told,
      );
    }
    const result = policy === 'recompute' ? 'recomputed' : 'failed';
    expect((await metricsOf(workers[1]!)).get(`pd_kv_loads_total{result="${result}"}`)).toBe(1);
  });
});
