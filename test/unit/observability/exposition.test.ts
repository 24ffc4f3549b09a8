/** The metrics pages as Prometheus takes them in: read by rules of our own everywhere, and by its own tool where that is installed. */
import { spawnSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { MetricsPage } from '../../../src/observability/metrics.ts';
import { createRegistry } from '../../../src/observability/registry.ts';
import { createProxyMetrics } from '../../../src/proxy/metrics.ts';
import { InstanceRegistry } from '../../../src/proxy/registry.ts';
import { lintExposition } from '../../support/exposition.ts';

const pages: [of: string, page: () => Promise<string>][] = [
  [
    'worker',
    async () => {
      const [core, transfer] = [new MetricsPage(), new MetricsPage()];
      core.observe('vllm:time_to_first_token_seconds', 0.3);
      transfer.observe('pd_transfer_seconds', 90);
      transfer.inc('pd_protocol_errors_total', 2, 'limit');
      return await createRegistry([core, transfer], { model_name: 'a "model" of\\ours' }).metrics();
    },
  ],
  [
    'proxy',
    async () => {
      const instances = new InstanceRegistry(10_000);
      const load = { running: 1, waiting: 2, kvUsed: 3, kvBlocks: 4, queuedTokens: 5 };
      instances.announce({ role: 'producer', httpAddress: '[::1]:1', zmqAddress: '[::1]:2', load });
      const metrics = createProxyMetrics({ instances, cachedBlocks: () => 0, queued: () => 0 });
      const route = metrics.routeOf('/v1/completions');
      route.statuses.inc(200);
      route.errors.inc('NO_INSTANCE');
      route.seconds.observe(0.3);
      metrics.prefillSeconds.observe(0.02);
      return await metrics.registry.metrics();
    },
  ],
];

describe.each(pages)('the metrics of a %s', (_, page) => {
  it('have help, types, units and names as Prometheus wants them', async () => {
    expect(lintExposition(await page())).toEqual([]);
  });

  const { error } = spawnSync('promtool', ['--version']);
  it.skipIf(error)(
    'are clean for promtool but for the colons of vLLM (skipped without promtool: Debian package prometheus)',
    async () => {
      const { stderr } = spawnSync('promtool', ['check', 'metrics'], {
        input: await page(),
        encoding: 'utf8',
      });
      const said = stderr.split('\n').filter(Boolean);
      expect(said.filter((line) => !/^vllm:\w+ metric names should not contain ':'$/.test(line))).toEqual([]);
    },
  );
});

it.each([
  ['# HELP a_total A.\n# TYPE a_total gauge\na_total 1', 'a_total: only a counter ends in _total'],
  ['# HELP a A.\n# TYPE a counter\na 1', 'a: a counter ends in _total'],
  ['# TYPE a gauge\na 1', 'a: no HELP'],
  [
    '# HELP a_milliseconds A.\n# TYPE a_milliseconds gauge\na_milliseconds 1',
    'a_milliseconds: not in a base unit',
  ],
  ['# HELP a:b A.\n# TYPE a:b gauge\na:b 1', 'a:b: a colon is for recording rules'],
])('a page with a fault is told from a clean one: %j', (page, fault) => {
  expect(lintExposition(page)).toEqual([fault]);
});
