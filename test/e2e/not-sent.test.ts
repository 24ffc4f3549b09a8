/**
 * By the frozen wire: a producer that cannot send its KV says so with its answer, and the consumer computes the prompt, or fails, at once. Its deadline is far
 * longer than the test's.
 */
import { afterEach, describe, expect, it } from 'vitest';
import {
  metricsOf,
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from '../support/cluster.ts';

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

describe.each([
  ['it has no room to gather it', 'PUT_ASYNC', NO_ROOM, [], 'KV_BUFFER_FULL'],
  ['it has no room to keep it', 'GET', NO_ROOM, [], 'KV_BUFFER_FULL'],
  ['the consumer is not where it says', 'PUT', ['--connect-timeout', '500ms'], ELSEWHERE, 'PEER_UNREACHABLE'],
  [
    'the consumer is not where it says',
    'PUT_ASYNC',
    ['--connect-timeout', '500ms'],
    ELSEWHERE,
    'PEER_UNREACHABLE',
  ],
] as const)('%s (%s)', (_, sendType, ofProducer, ofConsumer, code) => {
  it.each([
    ['recompute', 4],
    ['recompute', 0],
    ['fail', 4],
  ] as const)('policy %s, at most %i asked at once', async (policy, overlap) => {
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
