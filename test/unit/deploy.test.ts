/** What deploy/ asks for exists, and fits. No cluster runs here. */
import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { parse, parseAllDocuments, stringify } from 'yaml';
import { type OptionTable, parseValue } from '../../src/config/options.ts';
import { PROXY_OPTIONS } from '../../src/config/proxy-config.ts';
import { WORKER_OPTIONS } from '../../src/config/worker-options.ts';
import { ROOT } from '../../support/root.ts';
import { sharedTempDir } from '../support/temp-dir.ts';

interface Probe {
  readonly httpGet: { readonly path: string; readonly port: string };
  readonly periodSeconds: number;
  readonly failureThreshold?: number;
}

interface Container {
  readonly image: string;
  readonly command: readonly string[];
  readonly ports: readonly { readonly name: string; readonly containerPort: number }[];
  readonly startupProbe?: Probe;
  readonly readinessProbe: Probe;
  readonly livenessProbe: Probe;
  readonly lifecycle?: { readonly preStop: { readonly exec: { readonly command: readonly string[] } } };
  readonly resources: Record<'requests' | 'limits', Readonly<Record<string, string>>>;
  readonly volumeMounts?: readonly { readonly name: string }[];
}

interface Manifest {
  readonly kind: string;
  readonly metadata: { readonly name: string };
  readonly spec: {
    readonly selector?: Readonly<Record<string, unknown>>;
    readonly ports?: readonly { readonly port: number; readonly targetPort: string }[];
    readonly template?: {
      readonly metadata: { readonly labels: Readonly<Record<string, string>> };
      readonly spec: {
        readonly terminationGracePeriodSeconds: number;
        readonly containers: readonly Container[];
        readonly volumes?: readonly { readonly name: string }[];
      };
    };
  };
}

const sharedDir = sharedTempDir();
const BASE = join(ROOT, 'deploy/kubernetes/base');
const TABLES: Readonly<Record<string, OptionTable>> = {
  'pd-proxy': PROXY_OPTIONS,
  'pd-worker': WORKER_OPTIONS,
};

const manifests = (
  parse(readFileSync(join(BASE, 'kustomization.yaml'), 'utf8')) as { resources: string[] }
).resources
  .flatMap((file) => parseAllDocuments(readFileSync(join(BASE, file), 'utf8')))
  .map((document) => {
    expect(document.errors).toEqual([]);
    return document.toJS() as Manifest;
  });
const pods = manifests.flatMap(({ metadata, spec: { template } }) =>
  template ? [{ name: metadata.name, labels: template.metadata.labels, ...template.spec }] : [],
);

/** The value of each flag of a command, by option. Throws for a flag that does not exist or a value that is not allowed. */
function optionsOf([program, ...flags]: readonly string[]): Record<string, unknown> {
  const table = TABLES[program!]!;
  return Object.fromEntries(
    flags.map((flag) => {
      const [, name = '', value = ''] = /^--([a-z-]+)=(.+)$/.exec(flag) ?? [];
      const option = name.replace(/-(.)/g, (_, letter: string) => letter.toUpperCase());
      expect(table, flag).toHaveProperty(option);
      return [option, parseValue(table[option]!.kind, value.replace('$(POD_IP)', '10.0.0.1'), flag)];
    }),
  );
}

const sizeOf = (text: string) =>
  Number.parseFloat(text) * ({ Mi: 2 ** 20, Gi: 2 ** 30 }[text.replace(/[\d.]/g, '')] ?? 1);

it.each(pods.map((pod) => [pod.name, pod] as const))(
  '%s: flags exist, ports and volumes are there, a drain fits into its grace period',
  (_, { containers, volumes = [], terminationGracePeriodSeconds }) => {
    for (const { command, ports, lifecycle, resources, volumeMounts = [], ...probes } of containers) {
      const { port, kvPort, discoveryPort, drainTimeout } = optionsOf(command);
      expect(ports.map(({ containerPort }) => containerPort)).toEqual([port, kvPort ?? discoveryPort]);
      for (const probe of [probes.startupProbe, probes.readinessProbe, probes.livenessProbe]) {
        if (!probe) continue;
        expect(['/ready', '/health']).toContain(probe.httpGet.path);
        expect(ports.map(({ name }) => name)).toContain(probe.httpGet.port);
      }
      const drainSeconds = Number(drainTimeout) / 1_000;
      const pause = Number(lifecycle?.preStop.exec.command[1] ?? 0);
      expect(terminationGracePeriodSeconds).toBeGreaterThan(drainSeconds + pause);
      // A worker that drains answers 503 to /health.
      const { periodSeconds, failureThreshold = 3 } = probes.livenessProbe;
      expect(periodSeconds * failureThreshold).toBeGreaterThan(drainSeconds);
      for (const [what, wanted] of Object.entries(resources.requests))
        expect(sizeOf(resources.limits[what] ?? wanted)).toBeGreaterThanOrEqual(sizeOf(wanted));
      for (const { name } of volumeMounts) expect(volumes.map((volume) => volume.name)).toContain(name);
    }
  },
);

it('services find pods, and workers the proxies', () => {
  const services = manifests.filter(({ kind }) => kind === 'Service');
  for (const { spec, metadata } of services) {
    const found = pods.filter(({ labels }) =>
      Object.entries(spec.selector!).every(([label, value]) => labels[label] === value),
    );
    expect(found.length, metadata.name).toBeGreaterThan(0);
    for (const { targetPort } of spec.ports!)
      for (const { containers } of found)
        expect(containers.flatMap(({ ports }) => ports.map(({ name }) => name))).toContain(targetPort);
  }
  for (const { containers } of pods.filter(
    ({ labels }) => labels['app.kubernetes.io/component'] === 'worker',
  )) {
    const [{ host, port }] = optionsOf(containers[0]!.command)['proxy'] as [{ host: string; port: number }];
    const service = services.find(({ metadata }) => metadata.name === host)!;
    expect(service.spec.ports!.map((one) => one.port)).toContain(port);
  }
});

it('what the keys are patched in by exists too', () => {
  const { patches } = parse(
    readFileSync(join(ROOT, 'deploy/kubernetes/keys/kustomization.yaml'), 'utf8'),
  ) as {
    patches: { target: { kind: string }; patch: string }[];
  };
  for (const { target, patch } of patches) {
    const program = target.kind === 'Deployment' ? 'pd-proxy' : 'pd-worker';
    const flags = (parse(patch) as { value: unknown }[])
      .map(({ value }) => value)
      .filter((v) => typeof v === 'string');
    expect(Object.keys(optionsOf([program, ...flags]))).toContain('apiKeyFile');
  }
});

it('the image copies what is there, and runs as who owns the node’s folder', () => {
  const text = readFileSync(join(ROOT, 'deploy/Containerfile'), 'utf8');
  const [, copied = ''] = /cp -a (.+) \/app\//.exec(text) ?? [];
  const made = ['dist', 'node_modules'];
  for (const name of copied.split(' ')) expect([...made, ...readdirSync(ROOT)]).toContain(name);
  expect(text).toContain('USER 10001');
});

it('the image copies whatever the programs read from where they are installed', () => {
  const sources = readdirSync(join(ROOT, 'src'), { recursive: true, encoding: 'utf8' })
    .filter((file) => file.endsWith('.ts'))
    .map((file) => readFileSync(join(ROOT, 'src', file), 'utf8'));
  const read = sources.flatMap((text) =>
    [...text.matchAll(/installedFile\(['`]([^'`/]+)/g)].map(([, top]) => top),
  );
  const text = readFileSync(join(ROOT, 'deploy/Containerfile'), 'utf8');
  const [, copied = ''] = /cp -a (.+) \/app\//.exec(text) ?? [];
  expect(read.length).toBeGreaterThan(3);
  expect(copied.split(' ')).toEqual(expect.arrayContaining(read));
});

describe('rules and dashboard', () => {
  const RULES = join(ROOT, 'deploy/monitoring/rules.yaml');
  const { groups } = parse(readFileSync(RULES, 'utf8')) as { groups: { rules: { expr: string }[] }[] };
  const dashboard = readFileSync(join(ROOT, 'deploy/monitoring/grafana.json'), 'utf8');
  const { panels } = JSON.parse(dashboard) as { panels: { targets: { expr: string }[] }[] };
  const shown = panels.flatMap(({ targets }) => targets.map(({ expr }) => expr));

  it('ask for metrics that there are, and that are described', () => {
    const described = ['operations', 'routing'].map((name) =>
      readFileSync(join(ROOT, `docs/${name}.md`), 'utf8'),
    );
    const sources = ['src/observability/metrics.ts', 'src/proxy/metrics.ts', 'src/worker/server/server.ts']
      .map((file) => readFileSync(join(ROOT, file), 'utf8'))
      .join('\n');
    const exprs = [...groups.flatMap(({ rules }) => rules.map(({ expr }) => expr)), ...shown];
    const names = new Set(exprs.flatMap((expr) => expr.match(/\b(?:pd_|vllm:)[a-z_]+/g) ?? []));
    expect(names.size).toBeGreaterThan(20);
    for (const name of names) {
      const whole = name.replace(/_bucket$/, '');
      expect(sources).toMatch(new RegExp(`\\b${whole}\\b`));
      // The table of those by instance leaves out what they all begin with; of vLLM's, vLLM tells.
      if (whole.startsWith('pd_')) expect(described.join()).toContain(whole.replace('pd_proxy_worker_', '`'));
    }
  });

  const { error } = spawnSync('promtool', ['--version']);
  it.skipIf(error)('are what Prometheus reads (skipped without promtool: Debian package prometheus)', () => {
    const file = join(sharedDir, 'dashboard.yaml');
    const rules = shown.map((expr, i) => ({
      record: `shown:${i}`,
      expr: expr.replaceAll('$__rate_interval', '1m'),
    }));
    writeFileSync(file, stringify({ groups: [{ name: 'dashboard', rules }] }));
    const { status, stderr } = spawnSync('promtool', ['check', 'rules', RULES, file], { encoding: 'utf8' });
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
  });
});
