/** A real Prometheus over a proxy and a pair, with the rules and the dashboard of deploy/monitoring. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { parse } from 'yaml';
import { formatHostPort } from '../../src/net/address.ts';
import type { PdProxy } from '../../src/proxy/proxy.ts';
import { Authority } from '../../support/certificates.ts';
import { ROOT } from '../../support/root.ts';
import {
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from '../support/cluster.ts';
import { NO_PROMETHEUS, Prometheus } from '../support/prometheus.ts';
import { startQuietProxy } from '../support/quiet-proxy.ts';
import { sharedTempDir } from '../support/temp-dir.ts';

interface Rule {
  readonly alert: string;
  readonly expr: string;
  for?: string;
}

const DIR = sharedTempDir();
const MONITORING = join(ROOT, 'deploy/monitoring');
const rules = parse(readFileSync(join(MONITORING, 'rules.yaml'), 'utf8')) as {
  groups: { name: string; rules: Rule[] }[];
};
// So that the test need not wait as long as an operator would.
for (const { rules: group } of rules.groups) for (const rule of group) rule.for = '0s';
const alerts = rules.groups.flatMap((group) => group.rules);
const dashboard = JSON.parse(readFileSync(join(MONITORING, 'grafana.json'), 'utf8')) as {
  panels: { title: string; targets: { expr: string }[] }[];
};
const shown = dashboard.panels.flatMap(({ title, targets }) =>
  targets.map(({ expr }) => [title, expr.replaceAll('$__rate_interval', '1m')] as const),
);

describe.skipIf(NO_PROMETHEUS)('with Prometheus (skipped without it: Debian package prometheus)', () => {
  let proxy: ProxyHandle;
  let secured: PdProxy;
  let producer: WorkerHandle;
  let consumer: WorkerHandle;
  let prometheus: Prometheus;
  let traffic: Promise<void> | undefined;
  let asking = true;

  beforeAll(async () => {
    // The proxy finds out by itself that an instance is dead.
    proxy = await startProxy(['--health-interval', '200ms']);
    [producer, consumer] = await Promise.all([
      startWorker('producer', proxy),
      startWorker('consumer', proxy),
    ]);
    await untilListed(proxy, 1, 1);
    const authority = new Authority(DIR);
    const [server, scraper] = [authority.sign('proxy'), authority.sign('prometheus')];
    secured = await startQuietProxy({
      access: { tlsCert: server.cert, tlsKey: server.key, tlsClientCa: authority.ca, corsOrigins: [] },
    });
    const job = (name: string, ...targets: string[]) => ({
      job_name: name,
      static_configs: [{ targets }],
    });
    const tls = { scheme: 'https', tls_config: { ca_file: authority.ca } };
    const certificate = { cert_file: scraper.cert, key_file: scraper.key };
    const address = formatHostPort(secured.httpAddress);
    const scrapes = [
      job('pd-proxy', addressOf(proxy)),
      job('pd-worker', addressOf(producer), addressOf(consumer)),
      { ...job('with a certificate', address), ...tls, tls_config: { ...tls.tls_config, ...certificate } },
      { ...job('without', address), ...tls },
    ];
    prometheus = await Prometheus.start(join(DIR, 'prometheus'), scrapes, rules);
    traffic = ask();
  });

  afterAll(async () => {
    asking = false;
    await traffic;
    await prometheus?.stop();
    await secured?.close(0);
    for (const { program } of [consumer, producer, proxy]) await program.stop('SIGKILL');
  });

  async function ask(): Promise<void> {
    for (let i = 0; asking; i++) {
      const body = {
        prompt: `Number ${i}. ${'Once upon a time there was '.repeat(10)}`,
        max_tokens: 4,
        stream: true,
      };
      const response = await fetch(`${proxy.url}/v1/completions`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify(body),
      }).catch(() => undefined);
      await response?.text();
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
  }

  async function until(what: () => Promise<boolean>): Promise<void> {
    while (!(await what())) await new Promise((resolve) => setTimeout(resolve, 200));
  }

  const addressOf = ({ url }: ProxyHandle | WorkerHandle) => url.replace('http://', '');

  /** Labels of the alerts of this fleet; the proxy with a certificate has no instances. */
  async function firing(): Promise<Record<string, string>[]> {
    const { alerts } = await prometheus.get<{
      alerts: { state: string; labels: Record<string, string> }[];
    }>('alerts');
    const ours = [proxy, producer, consumer].map(addressOf);
    return alerts.flatMap(({ state, labels }) =>
      state === 'firing' && ours.includes(labels['instance']!) ? [labels] : [],
    );
  }

  test('all targets are up, one that asks for a certificate for whoever has one', async () => {
    const up = async () =>
      Object.fromEntries(
        (await prometheus.query('min by (job) (up)')).map(({ metric, value }) => [metric['job'], value[1]]),
      );
    const all = { 'pd-proxy': '1', 'pd-worker': '1', 'with a certificate': '1', without: '0' };
    await until(async () => isDeepStrictEqual(await up(), all));
  });

  test('what rules and dashboard ask for has been scraped', async () => {
    const exprs = [...alerts.map(({ expr }) => expr), ...shown.map(([, expr]) => expr)];
    const names = new Set(exprs.flatMap((expr) => expr.match(/\b(?:pd_|vllm:)[a-z_]+/g) ?? []));
    const scraped = await prometheus.get<Record<string, unknown>>('metadata');
    expect([...names].filter((name) => !(name.replace(/_bucket$/, '') in scraped))).toEqual([]);
  });

  test.each(shown)('%s: %s', async (_, expr) => {
    if (QUIET.some((name) => expr.includes(name))) {
      await prometheus.query(expr);
      return;
    }
    await until(async () => (await prometheus.query(expr)).some(({ value }) => value[1] !== 'NaN'));
  });

  test('rules are evaluated without errors, and of a fleet that is well no alert fires', async () => {
    type Rules = { groups: { rules: { name: string; health: string; lastError?: string }[] }[] };
    const evaluated = async () =>
      (await prometheus.get<Rules>('rules')).groups.flatMap((group) => group.rules);
    await until(async () => (await evaluated()).every(({ health }) => health !== 'unknown'));
    expect((await evaluated()).map(({ lastError = '' }) => lastError)).toEqual(alerts.map(() => ''));
    await until(async () => (await firing()).length === 0);
  });

  test('an instance that dies is named by an alert', async () => {
    await consumer.program.stop('SIGKILL');
    await until(async () =>
      (await firing()).some(
        ({ alertname, worker, role }) =>
          alertname === 'PdInstanceEjected' && worker === addressOf(consumer) && role === 'consumer',
      ),
    );
  });
});

/** Of these there is nothing to show while all is well. */
const QUIET = ['turned_away', 'retries_total', 'key_requests', 'request_errors'];
