/** Traces of a proxy in this process, and receivers that err or hang. Those of a real pair are in test/e2e/native.test.ts. */
import { EventEmitter, once } from 'node:events';
import { afterEach, expect, test } from 'vitest';
import { formatHostPort } from '../../src/net/address.ts';
import { createLogger } from '../../src/observability/log.ts';
import { monotonicMs } from '../../src/observability/timelines.ts';
import { type SpanResult, Tracing, type TracingOptions } from '../../src/observability/tracing.ts';
import type { PdProxy } from '../../src/proxy/proxy.ts';
import { answerJson, FakeUpstream } from '../support/fake-upstream.ts';
import { OtlpReceiver } from '../support/otlp-receiver.ts';
import { startQuietProxy } from '../support/quiet-proxy.ts';

const closing: (() => Promise<unknown>)[] = [];
afterEach(async () => {
  for (const close of closing.splice(0).reverse()) await close();
});

async function startReceiver(): Promise<OtlpReceiver> {
  const receiver = await OtlpReceiver.start();
  closing.push(() => receiver.close());
  return receiver;
}

function tracingTo(receiver: OtlpReceiver, options: Partial<TracingOptions> = {}) {
  const counts: Record<SpanResult, number> = { exported: 0, failed: 0, dropped: 0 };
  const counted = new EventEmitter();
  const tracing = new Tracing({
    endpoint: receiver.url,
    service: 'test',
    log: createLogger({ level: 'silent', format: 'json' }, 'test'),
    count: (result, spans) => {
      counts[result] += spans;
      counted.emit('count');
    },
    env: {},
    intervalMs: 1,
    ...options,
  });
  const add = (spans = 1) => {
    const trace = tracing.begin({})!;
    const now = monotonicMs();
    const span = { parentId: undefined, name: 'test', kind: 'internal', from: now - 5, to: now } as const;
    tracing.add(
      trace,
      Array.from({ length: spans }, (_, i) => ({ ...span, id: String(i).padStart(16, '0') })),
    );
    return trace;
  };
  return { tracing, counts, counted, add };
}

test('spans go to the path of traces with what the environment says, in wall-clock time', async () => {
  const receiver = await startReceiver();
  const env = {
    OTEL_SERVICE_NAME: 'named',
    OTEL_EXPORTER_OTLP_HEADERS: 'authorization=Bearer%20secret,x-tenant=a',
    OTEL_RESOURCE_ATTRIBUTES: 'deployment.environment.name=test',
  };
  const { tracing, counts, add } = tracingTo(receiver, { endpoint: `${receiver.url}/base/`, env });
  const { traceId } = add();
  const before = Date.now();
  await once(receiver.events, 'post');
  await tracing.close();
  expect(receiver.asked[0]).toMatchObject({
    path: '/base/v1/traces',
    headers: { 'content-type': 'application/json', authorization: 'Bearer secret', 'x-tenant': 'a' },
  });
  expect(receiver.spans).toMatchObject([{ traceId, name: 'test', service: 'named' }]);
  const { startTimeUnixNano: from, endTimeUnixNano: to } = receiver.spans[0]!;
  expect(Number(to) - Number(from)).toBeCloseTo(5e6, -4);
  // Neither seconds nor another epoch: a clock that is set while this runs may be off by as much.
  expect(Math.abs(Number(to) / 1e6 - before)).toBeLessThan(3_600_000);
  expect(counts).toEqual({ exported: 1, failed: 0, dropped: 0 });
});

test('what a receiver does not take is counted, and what comes later is sent all the same', async () => {
  const receiver = await startReceiver();
  receiver.status = 503;
  const { tracing, counts, add } = tracingTo(receiver);
  add();
  await once(receiver.events, 'post');
  receiver.status = 200;
  add();
  await once(receiver.events, 'post');
  await tracing.close();
  expect(counts).toEqual({ exported: 1, failed: 1, dropped: 0 });
});

test('a receiver that hangs has its deadline, and no more waits for it than there is room for', async () => {
  const receiver = await startReceiver();
  receiver.status = undefined;
  const { tracing, counts, counted, add } = tracingTo(receiver, { postMs: 50 });
  for (let i = 0; i < 100; i++) add(100);
  expect(counts).toEqual({ exported: 0, failed: 0, dropped: 1_900 });
  // One deadline after the other.
  while (counts.failed <= 1_024) await once(counted, 'count');
  await tracing.close();
  expect(counts.exported).toBe(0);
});

test('a proxy answers whatever its receiver does, and stops', async () => {
  const receiver = await startReceiver();
  receiver.status = undefined;
  const proxy: PdProxy = await startQuietProxy({ otlpEndpoint: receiver.url });
  closing.push(() => proxy.close(0));
  const instances = await Promise.all(
    (['producer', 'consumer'] as const).map((role) => FakeUpstream.start(role, answerJson())),
  );
  for (const instance of instances) {
    closing.push(() => instance.kill());
    await instance.ping(proxy.discoveryAddress);
  }
  await proxy.untilPaired();
  const post = (headers: Record<string, string> = {}) =>
    fetch(`http://${formatHostPort(proxy.httpAddress)}/v1/completions`, {
      method: 'POST',
      headers,
      body: JSON.stringify({ model: 'm', prompt: 'Hello' }),
    });
  expect((await post()).status).toBe(200);
  while (receiver.spans.length === 0) await once(receiver.events, 'post');
  expect((await post()).status).toBe(200);
  const told = instances.map(({ asked }) => asked[0]!.headers['traceparent']);
  const [root, ...others] = receiver.spans;
  expect(root).toMatchObject({ name: 'POST /v1/completions', kind: 2, service: 'pd-proxy' });
  expect(root!.parentSpanId).toBeUndefined();
  expect(others.map(({ name, parentSpanId }) => [name, parentSpanId])).toEqual(
    ['pd.queue', 'pd.placement', 'pd.prefill', 'pd.decode'].map((name) => [name, root!.spanId]),
  );
  // Each instance is told of the span that it is asked under.
  expect(told).toEqual(others.slice(2).map(({ traceId, spanId }) => `00-${traceId}-${spanId}-01`));
  // A client that does not record is not recorded: what it says goes on as it is.
  const unsampled = `00-${'a'.repeat(32)}-${'b'.repeat(16)}-00`;
  expect((await post({ traceparent: unsampled, tracestate: 'v=1' })).status).toBe(200);
  for (const { asked } of instances)
    expect(asked.at(-1)!.headers).toMatchObject({ traceparent: unsampled, tracestate: 'v=1' });
  await proxy.close();
  expect(receiver.traceOf('a'.repeat(32))).toEqual([]);
});
