import { expect, test } from 'vitest';
import { proxyConfig } from '../../../src/cli/proxy.ts';
import { createLogger } from '../../../src/observability/log.ts';
import { Admission } from '../../../src/proxy/admission.ts';
import { PromptCaches } from '../../../src/proxy/caches.ts';
import { LocalCoordinator, type Visit } from '../../../src/proxy/coordinator.ts';
import { createProxyMetrics } from '../../../src/proxy/metrics.ts';
import { InstanceRegistry, type InstanceRole } from '../../../src/proxy/registry.ts';

/** With two producers and a consumer. */
function setUp(bypass = ['--bypass-tokens', '100']) {
  let now = 1_000;
  const config = proxyConfig(['--policy', 'round-robin', ...bypass], {});
  const registry = new InstanceRegistry(3_600_000, () => now, {
    producer: 'round-robin',
    consumer: 'round-robin',
  });
  const metrics = createProxyMetrics({ instances: registry, cachedBlocks: () => 0, queued: () => 0 });
  const caches = new PromptCaches(config, createLogger({ level: 'silent', format: 'json' }, 'test'), metrics);
  const admission = new Admission({ requests: 0, tokens: 0, queued: 0, waitMs: 1_000 }, () => {});
  const coordinator = new LocalCoordinator({ config, registry, caches, admission, metrics });
  const announce = (role: InstanceRole, port: number) =>
    registry.announce({
      role,
      httpAddress: `10.0.0.1:${port}`,
      zmqAddress: `10.0.0.1:${port + 1}`,
      fingerprint: { digest: 'd', model: 'm' },
    });
  announce('producer', 1);
  announce('producer', 3);
  announce('consumer', 5);
  const enter = (tokens: number): Promise<Visit> => {
    const keys = { textKeys: [], blockKeys: new Map() };
    const prompt = { model: undefined, prompts: 1, tokens, tokenized: false, ...keys };
    return coordinator.enter({ key: 'anyone', priority: 0, prompt }, new AbortController().signal);
  };
  const pass = (ms: number) => {
    now += ms;
  };
  return { registry, enter, pass };
}

test('a producer that may be tried again is, by the first request that needs a producer, and by that alone', async () => {
  const { registry, enter, pass } = setUp();
  const [broken] = registry.list('producer');
  const { breaker } = registry.standing(broken!)!;
  breaker.open(1_000);
  pass(1_000);
  // Short prompts are computed by their consumer alone, whichever producer is named beside it.
  const short = await Promise.all([enter(50), enter(50), enter(50)]);
  expect(short.map(({ placement }) => placement.alone)).toEqual([true, true, true]);
  expect(breaker.state).toBe('half-open');
  const long = await Promise.all([enter(500), enter(500), enter(500), enter(500)]);
  const there = long.filter(({ placement }) => placement.pair.producer.httpAddress === broken!.httpAddress);
  expect(there).toHaveLength(1);
  expect(breaker.state).toBe('open');
  for (const visit of [...short, ...long]) visit.end();
});

test('a prompt that would wait too long at its producer goes to its consumer alone, as long as that has little to compute', async () => {
  const { registry, enter } = setUp(['--bypass-wait', '150ms']);
  // 0.025 ms a token: each prompt takes a producer 63 ms, and the two take turns.
  for (const producer of registry.list('producer')) registry.learn(producer, 10_000, 250);
  const visits: Visit[] = [];
  for (let i = 0; i < 10; i++) visits.push(await enter(2_500));
  // Three at each are 190 ms. Of the next the consumer has two after 94 and 188, and would have a third after 281 ms: later than a producer.
  const alone = visits.map(({ placement }) => Number(placement.alone));
  expect(alone).toEqual([0, 0, 0, 0, 0, 0, 1, 1, 0, 0]);
  for (const visit of visits) visit.end();
  expect((await enter(2_500)).placement.alone).toBe(false);
});
