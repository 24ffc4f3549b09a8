import { expect, test } from 'vitest';
import { parseMetrics } from '../../../src/doctor/worker-state.ts';
import { createProxyMetrics, sumMetrics } from '../../../src/proxy/metrics.ts';
import { InstanceRegistry } from '../../../src/proxy/registry.ts';

const PRODUCER = { role: 'producer', httpAddress: '10.0.0.1:8000', zmqAddress: '10.0.0.1:1' } as const;
const CONSUMER = { role: 'consumer', httpAddress: '10.0.0.2:8000', zmqAddress: '10.0.0.2:1' } as const;

function watched() {
  let now = 0;
  const instances = new InstanceRegistry(60_000, () => now);
  const metrics = createProxyMetrics({ instances, cachedBlocks: () => 0, queued: () => 0 });
  const series = async () => parseMetrics(await metrics.registry.metrics());
  const pass = (ms: number) => {
    now += ms;
  };
  return { instances, metrics, series, pass };
}

const ofProducer = (name: string, more = '') =>
  `pd_proxy_worker_${name}{worker="10.0.0.1:8000",role="producer"${more}}`;

test('an instance shows what it tells and what it was asked, and nothing once it has gone', async () => {
  const { instances, series } = watched();
  const load = { running: 3, waiting: 2, kvUsed: 25, kvBlocks: 100, queuedTokens: 700 };
  instances.announce({ ...PRODUCER, load });
  instances.announce(CONSUMER);
  const [producer, consumer] = instances.list();
  instances.standing(producer!)!.work.begin(100);
  instances.standing(producer!)!.tally.outcomes.success += 2;
  instances.standing(producer!)!.tally.prefill.observe(0.3);
  instances.standing(consumer!)!.tally.firstEvent.observe(2);
  instances.drain(PRODUCER.httpAddress, true);
  const shown = await series();
  const value = (name: string, more?: string) => shown.get(ofProducer(name, more));
  expect(
    ['requests_active', 'requests_running', 'requests_waiting', 'queued_tokens', 'draining'].map((name) =>
      value(name),
    ),
  ).toEqual([1, 3, 2, 700, 1]);
  expect(value('kv_cache_usage_ratio')).toBe(0.25);
  expect(['success', 'failure'].map((what) => value('requests_total', `,outcome="${what}"`))).toEqual([2, 0]);
  const bucket = (le: string) =>
    shown.get(`pd_proxy_worker_prefill_seconds_bucket{le="${le}",worker="10.0.0.1:8000",role="producer"}`);
  expect([bucket('0.25'), bucket('0.5'), bucket('+Inf')]).toEqual([0, 1, 1]);
  expect(value('prefill_seconds_sum')).toBe(0.3);
  // Of vLLM's, which do not tell, there is nothing to show.
  const told = [...shown.keys()].filter(
    (key) => key.includes('10.0.0.2') && /running|waiting|ratio/.test(key),
  );
  expect(told).toEqual([]);
  instances.leave(PRODUCER.httpAddress);
  instances.leave(CONSUMER.httpAddress);
  expect([...(await series()).keys()].filter((key) => key.includes('10.0.0.'))).toEqual([]);
});

test('a breaker shows its state, and each time that it has opened', async () => {
  const { instances, series, pass } = watched();
  instances.announce(PRODUCER);
  const breaker = instances.standing(instances.list()[0]!)!.breaker;
  const states: unknown[] = [];
  const look = async () => {
    const shown = await series();
    states.push(['breaker_state', 'ejections_total'].map((name) => shown.get(ofProducer(name))));
  };
  await look();
  for (let i = 0; i < 3; i++) breaker.failed();
  await look();
  breaker.open(); // as probes go on to say
  await look();
  pass(10_000);
  await look();
  breaker.chosen();
  breaker.failed();
  await look();
  pass(30_000);
  breaker.succeeded();
  await look();
  expect(states).toEqual([
    [0, 0],
    [1, 1],
    [1, 1],
    [2, 1],
    [1, 2],
    [0, 2],
  ]);
});

test('what several processes have counted of routes is summed, an instance is shown by their owner', async () => {
  const { instances, metrics } = watched();
  instances.announce(PRODUCER);
  instances.standing(instances.list()[0]!)!.work.begin(1);
  const relays = [createProxyMetrics(), createProxyMetrics()];
  for (const relay of relays) {
    const route = relay.routeOf('/v1/completions');
    route.statuses.inc(200);
    route.errors.inc('OVERLOADED');
    route.seconds.observe(0.02);
  }
  const all = [metrics, ...relays].map(({ registry }) => registry.getMetricsAsJSON());
  const shown = parseMetrics(await sumMetrics(await Promise.all(all)));
  const route = 'route="/v1/completions"';
  expect(shown.get(`pd_proxy_requests_total{${route},status="200"}`)).toBe(2);
  expect(shown.get(`pd_proxy_request_errors_total{${route},code="OVERLOADED"}`)).toBe(2);
  expect(shown.get(`pd_proxy_request_duration_seconds_bucket{le="0.025",${route}}`)).toBe(2);
  expect(shown.get(`pd_proxy_request_duration_seconds_count{${route}}`)).toBe(2);
  expect(shown.get(ofProducer('requests_active'))).toBe(1);
});
