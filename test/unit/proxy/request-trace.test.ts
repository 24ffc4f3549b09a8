import { expect, test } from 'vitest';
import { Receipts } from '../../../src/proxy/receipts.ts';
import { InstanceRegistry } from '../../../src/proxy/registry.ts';
import { spansOf } from '../../../src/proxy/request-trace.ts';

const TRACE = { traceId: 'a'.repeat(32), parentId: undefined, spanId: 'c'.repeat(16), state: undefined };

function pairOf() {
  const registry = new InstanceRegistry(1_000, () => 0);
  for (const [role, at] of [
    ['producer', 1],
    ['consumer', 2],
  ] as const)
    registry.announce({ role, httpAddress: `10.0.0.${at}:80`, zmqAddress: `10.0.0.${at}:81` });
  const pair = registry.pair();
  if (typeof pair === 'string') throw new Error(pair);
  return pair;
}

test('each attempt has its spans, and the one that did not take the request has the error', () => {
  const receipts = new Receipts();
  const receipt = receipts.begin('/v1/chat/completions', 'team-a');
  Object.assign(receipt, { readAt: receipt.receivedAt + 1, queuedMs: 2, placedAt: receipt.receivedAt + 4 });
  const cachedTokens = { producer: 16, consumer: 0 };
  const takesIds = { producer: false, consumer: false };
  const placement = { pair: pairOf(), alone: false, early: true, takesIds, cachedTokens, choices: {} };
  const attempt = (requestId: string) =>
    receipts.attempt(receipt, {
      requestId,
      placement,
      native: false,
      spans: { producer: `${requestId}-p`, consumer: `${requestId}-c` },
    });
  const at = (ms: number) => receipt.receivedAt + ms;
  const first = attempt('one');
  Object.assign(first.at, { prefill: at(5), decode: at(5), end: at(8) });
  Object.assign(first, { refusedBy: 'producer', failure: 'it is stopping', overlapped: true });
  const second = attempt('two');
  Object.assign(second.at, {
    prefill: at(9),
    prefilled: at(20),
    decode: at(21),
    relayed: at(25),
    end: at(30),
  });
  receipts.end(receipt, 200, undefined);

  const spans = spansOf(receipt, TRACE);
  const told = spans.map(({ id, name, parentId, from, to, error }) => {
    const own = id === TRACE.spanId || id.includes('-') ? id : 'new';
    const times = [from, to].map((ms) => Math.round(ms - receipt.receivedAt));
    return [name, own, parentId, ...times, error];
  });
  const root = TRACE.spanId;
  expect(told).toEqual([
    ['POST /v1/chat/completions', root, undefined, 0, 30, undefined],
    ['pd.queue', 'new', root, 1, 3, undefined],
    ['pd.placement', 'new', root, 3, 4, undefined],
    ['pd.prefill', 'one-p', root, 5, 8, 'it is stopping'],
    ['pd.decode', 'one-c', root, 5, 8, undefined],
    ['pd.prefill', 'two-p', root, 9, 20, undefined],
    ['pd.decode', 'two-c', root, 21, 30, undefined],
  ]);
  expect(spans[0]!.attributes).toMatchObject({ 'gen_ai.operation.name': 'chat', 'pd.key': 'team-a' });
  expect(spans[3]!.attributes).toMatchObject({
    'server.address': '10.0.0.1',
    'pd.attempt': 0,
    'pd.consumer': '10.0.0.2:81',
    'pd.cached_tokens': 16,
    'pd.asked_early': true,
  });
});

test('of a request that came to no pair there is its wait', () => {
  const receipts = new Receipts();
  const receipt = receipts.begin('/v1/completions', undefined);
  receipt.readAt = receipt.receivedAt;
  receipts.end(receipt, 503, 'NO_INSTANCE');
  expect(spansOf(receipt, TRACE)).toMatchObject([
    { name: 'POST /v1/completions', error: 'NO_INSTANCE', attributes: { 'error.type': 'NO_INSTANCE' } },
    { name: 'pd.queue' },
  ]);
});
