import { describe, expect, test } from 'vitest';
import { doctorCommand } from '../../../src/cli/doctor.ts';
import { workerFindings } from '../../../src/doctor/worker-state.ts';
import type { ErrorCode, ErrorContext } from '../../../src/errors.ts';
import type { FailureKind, FailureState } from '../../../src/transfer/failures.ts';
import type { PairState, TransferState } from '../../../src/transfer/types.ts';

const PEER = '10.0.0.1:8082';
const pair = (state: PairState['state'], more: Partial<PairState> = {}): PairState => ({
  peer: PEER,
  direction: 'incoming',
  state,
  native: true,
  queued: 0,
  outstanding: 0,
  sinceMs: 20_000,
  ...more,
});
const wait = (nearMisses: string[] = [], sinceMs = 20_000) => ({
  requestId: 'cmpl-a-0-89abcdef',
  tensorId: 'cmpl-a-0#layer.0',
  peer: PEER,
  sinceMs,
  deadlineMs: 60_000,
  nearMisses,
});

const failure = (kind: FailureKind, code: ErrorCode, context: ErrorContext = {}): FailureState => ({
  kind,
  peer: PEER,
  error: { code, message: 'words', context },
  count: 1,
  agoMs: 5_000,
  recovered: false,
});

function findingsOf(transfer: Partial<TransferState>, metrics: Record<string, number> = {}) {
  return workerFindings(
    {
      role: 'consumer',
      requests: 1,
      core: {
        running: 0,
        waiting: 0,
        loading: 1,
        blocks: { used: 4, cached: 0, total: 64 },
        integrity: [],
        transfer: {
          address: '10.0.0.2:8084',
          sendType: 'PUT_ASYNC',
          kvKey: 'transfer',
          failures: [],
          pairs: [],
          buffer: { usedBytes: 0, thresholdBytes: 1_000 },
          pool: { usedBytes: 0, reservedBytes: 0, limitBytes: 1_000 },
          tensors: 0,
          waiting: [],
          ...transfer,
        },
      },
    },
    new Map(Object.entries(metrics)),
  );
}

function examine(transfer: Partial<TransferState>, metrics: Record<string, number> = {}) {
  return findingsOf(transfer, metrics).filter(({ level }) => level === 'fail');
}

test('a wait for a prompt that is still being computed is no finding', () => {
  expect(examine({ waiting: [{ ...wait(), prefilling: true }], pairs: [pair('open')] })).toEqual([]);
});

test('where something waits, it says how to tell a peer that computes from one that is stopped', () => {
  const last = (waiting: TransferState['waiting']) => findingsOf({ waiting, pairs: [pair('open')] }).at(-1);
  expect(last([])).toEqual({ level: 'ok', what: 'nothing waits longer than it should' });
  const ask = `\`pd-doctor --peer ${PEER}\` shows whether the peer still answers`;
  const prefilling = { ...wait(), prefilling: true as const };
  expect(last([prefilling])).toEqual({ level: 'info', what: `no deadline is near; ${ask}` });
  expect(last([{ ...prefilling, sinceMs: 50_000 }])).toEqual({ level: 'info', what: ask });
});

describe('a worker that waits is in scenario', () => {
  test.each<[string, Partial<TransferState>, RegExp]>([
    [
      '1: the pair is being opened',
      { waiting: [wait()], pairs: [pair('opening')] },
      /scenario 1.*communicator init/,
    ],
    ['1: also where nobody waits', { pairs: [pair('opening')] }, /scenario 1/],
    ['2: no pair', { waiting: [wait()] }, /scenario 2.*ZeroMQ/],
    ['2: the peer is not reached', { waiting: [wait()], pairs: [pair('connecting')] }, /scenario 2/],
    ['2: work for a peer that is gone', { pairs: [pair('over', { queued: 3 })] }, /scenario 2/],
    [
      '3: the pair is open and stuck',
      { waiting: [wait()], pairs: [pair('open', { outstanding: 2 })] },
      /scenario 3/,
    ],
    [
      '3: no room',
      {
        tensors: 4,
        buffer: { usedBytes: 1_000, thresholdBytes: 1_000 },
        pool: { usedBytes: 990, reservedBytes: 1_000, limitBytes: 1_000 },
      },
      /scenario 3.*buffer/,
    ],
    [
      '4: the same request under another suffix',
      { waiting: [wait(['cmpl-a-0-01234567#layer.0 (ready)'])], pairs: [pair('open')] },
      /scenario 4.*start the producer with --kv-key transfer/,
    ],
    [
      '4: likewise, from vLLM',
      {
        waiting: [wait(['cmpl-a-0-01234567#layer.0 (ready)'])],
        pairs: [pair('open', { native: false })],
      },
      /scenario 4.*vLLM producer with VLLM_DISABLE_REQUEST_ID_RANDOMIZATION=1/,
    ],
    [
      '4: KV is keyed by the full id here',
      { waiting: [wait(['cmpl-a-0-01234567#layer.0 (ready)'])], kvKey: 'engine' },
      /scenario 4.*start this consumer with --kv-key transfer/,
    ],
    [
      '1: the last pair could not be opened',
      { waiting: [wait()], failures: [failure('pair', 'PAIR_INIT_TIMEOUT')] },
      /scenario 1/,
    ],
    [
      '2: nothing waits any more',
      { failures: [failure('load', 'KV_LOAD_TIMEOUT', { pair: 'none' })] },
      /scenario 2/,
    ],
    [
      '3: announcements were refused',
      { failures: [failure('refused', 'KV_BUFFER_FULL'), failure('load', 'KV_BUFFER_FULL')] },
      /scenario 3.*--kv-buffer-size or --mem-pool-size-gb/,
    ],
    [
      '3: there is no memory for KV',
      {
        buffer: { usedBytes: 0, thresholdBytes: 0 },
        pool: { usedBytes: 0, reservedBytes: 0, limitBytes: 0 },
      },
      /scenario 3.*--kv-buffer-size or --mem-pool-size-gb/,
    ],
  ])('%s', (_, transfer, fix) => {
    const found = examine(transfer);
    expect(found).toHaveLength(1);
    expect(found[0]?.fix).toMatch(fix);
  });

  test('4: the wait names the key, and what came instead', () => {
    const [found] = examine({ waiting: [wait(['cmpl-a-0-01234567#layer.0 (ready)'])] });
    expect(found?.what).toBe(
      'cmpl-a-0-89abcdef has waited 20.0 s of 60.0 s for cmpl-a-0#layer.0 from 10.0.0.1:8082; ' +
        'what came instead: cmpl-a-0-01234567#layer.0 (ready)',
    );
  });

  test('none: a wait that has just begun, a pair that is open', () => {
    expect(examine({ waiting: [wait([], 100)], pairs: [pair('open')] })).toEqual([]);
    expect(examine({ pairs: [pair('open'), pair('opening', { sinceMs: 50 })] })).toEqual([]);
  });

  test('none: what failed has gone well since, or was long ago', () => {
    const past = failure('load', 'KV_BUFFER_FULL');
    expect(examine({ failures: [{ ...past, recovered: true }] })).toEqual([]);
    expect(examine({ failures: [{ ...past, agoMs: 3_600_000 }] })).toEqual([]);
  });
});

test('--worker takes a URL or an address', async () => {
  const url = async (text: string) => (await doctorCommand(['--worker', text], {})).options.workerUrl;
  expect(await url('10.0.0.2:8083')).toBe('http://10.0.0.2:8083');
  expect(await url('http://[::1]:8083')).toBe('http://[::1]:8083');
  await expect(url('http://')).rejects.toThrow(/--worker: "http:\/\/" is not a URL/);
});
