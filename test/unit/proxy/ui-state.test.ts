import { describe, expect, it, test } from 'vitest';
import type { Placement } from '../../../src/proxy/coordinator.ts';
import { Receipts } from '../../../src/proxy/receipts.ts';
import {
  type UiInstance,
  type UiMessage,
  type UiProxy,
  type UiSnapshot,
  UiState,
  uiRequest,
} from '../../../src/proxy/ui-state.ts';

const PROXY: UiProxy = {
  status: 'ok',
  version: '1',
  startedAt: 1,
  running: 0,
  queued: 0,
  paired: true,
  kept: 256,
};

function instance(address: string, requests = 0): UiInstance {
  return {
    address,
    kvAddress: '127.0.0.1:2',
    role: 'producer',
    model: null,
    models: null,
    sendType: null,
    native: true,
    tls: false,
    requests,
    queuedTokens: 0,
    kvUse: null,
    kvBlocks: null,
    cachedBlocks: null,
    breaker: 'closed',
    draining: false,
    refused: false,
    silentSeconds: 0,
  };
}

const read = (text: string | undefined) => (text === undefined ? undefined : (JSON.parse(text) as UiMessage));

describe('what a page is told', () => {
  const before: UiSnapshot = { proxy: PROXY, instances: [instance('a:1'), instance('b:1')], requests: [] };

  it('is everything at first, and nothing while nothing changes', () => {
    const state = new UiState();
    expect(read(state.update(before, 5))).toEqual({ now: 5, proxy: PROXY, instances: before.instances });
    expect(state.update(structuredClone(before), 6)).toBeUndefined();
    expect(read(state.whole(7))).toEqual({ now: 7, ...before });
  });

  it('is only what has changed, come or gone after that', () => {
    const state = new UiState();
    state.update(before, 5);
    const [busy, fresh] = [instance('a:1', 3), instance('c:1')];
    const proxy = { ...PROXY, running: 3 };
    const now = { proxy, instances: [busy, fresh], requests: [] };
    expect(read(state.update(now, 6))).toEqual({ now: 6, proxy, instances: [busy, fresh], gone: ['b:1'] });
    expect(read(state.whole(6))).toEqual({ now: 6, ...now });
  });
});

describe('a request', () => {
  function begun(streamed = true) {
    const receipts = new Receipts();
    const receipt = receipts.begin('/v1/completions', undefined);
    Object.assign(receipt, { receivedAt: 1_000, streamed });
    const attempt = (producer = 'p:1', alone = false) => {
      const placement = {
        pair: { producer: { httpAddress: producer }, consumer: { httpAddress: 'c:1' } },
        alone,
      };
      const begun = {
        requestId: 'id',
        placement: placement as unknown as Placement,
        native: true,
        spans: undefined,
      };
      return receipts.attempt(receipt, begun);
    };
    return { receipt, attempt };
  }

  test('waits at first, with nowhere to go', () => {
    const { receipt } = begun();
    expect(uiRequest(receipt)).toMatchObject({ status: 0, attempts: [], stages: [['queue', 0, null]] });
  });

  test('that is streamed is cut by all stages, the last of which goes on', () => {
    const { receipt, attempt } = begun();
    Object.assign(receipt, { readAt: 1_001, queuedMs: 20, placedAt: 1_022 });
    Object.assign(attempt().at, {
      prefill: 1_023,
      decode: 1_024,
      prefilled: 1_100,
      answered: 1_101,
      relayed: 1_108,
    });
    const stages = [
      ['queue', 0, 21],
      ['placement', 21, 23],
      ['prefill', 23, 100],
      ['hand-over', 100, 108],
    ];
    expect(uiRequest(receipt).stages).toEqual([...stages, ['decode', 108, null]]);
    Object.assign(receipt, { endedAt: 1_500, status: 200 });
    expect(uiRequest(receipt)).toMatchObject({ status: 200, stages: [...stages, ['decode', 108, 500]] });
  });

  test('that is not streamed has no hand-over of its own', () => {
    const { receipt, attempt } = begun(false);
    Object.assign(receipt, { readAt: 1_000, placedAt: 1_001 });
    Object.assign(attempt().at, { prefill: 1_001, prefilled: 1_050, decode: 1_050 });
    expect(uiRequest(receipt).stages.slice(-2)).toEqual([
      ['prefill', 1, 50],
      ['decode', 50, null],
    ]);
  });

  test('whose consumer computes the prompt itself has neither hand-over nor producer to wait for', () => {
    const { receipt, attempt } = begun();
    Object.assign(receipt, { readAt: 1_000, placedAt: 1_001, endedAt: 1_090, status: 200 });
    Object.assign(attempt('p:1', true).at, { decode: 1_002, answered: 1_029, relayed: 1_030 });
    expect(uiRequest(receipt)).toMatchObject({ wire: 'none' });
    expect(uiRequest(receipt).stages.slice(-2)).toEqual([
      ['prefill', 2, 30],
      ['decode', 30, 90],
    ]);
  });

  test('that another pair took, and that failed there, says so', () => {
    const { receipt, attempt } = begun();
    Object.assign(receipt, {
      readAt: 1_000,
      placedAt: 1_001,
      endedAt: 1_060,
      status: 502,
      code: 'UPSTREAM_FAILED',
    });
    const first = attempt();
    Object.assign(first.at, { prefill: 1_002 });
    Object.assign(first, { refusedBy: 'producer', failure: 'refused' });
    const second = attempt('q:1');
    Object.assign(second.at, { prefill: 1_040 });
    second.failure = 'broke off';
    const request = uiRequest(receipt);
    expect(request).toMatchObject({ status: 502, code: 'UPSTREAM_FAILED' });
    expect(request.stages.slice(-2)).toEqual([
      ['retry', 2, 40],
      ['prefill', 40, 60],
    ]);
    expect(request.attempts).toEqual([
      { producer: 'p:1', consumer: 'c:1', refusedBy: 'producer', failure: 'refused' },
      { producer: 'q:1', consumer: 'c:1', refusedBy: null, failure: 'broke off' },
    ]);
  });
});
