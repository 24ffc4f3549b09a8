/** A prom-client registry over metrics pages: each scrape reads the shared memory. */
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import { METRICS, type MetricName, type MetricsPage, readHistogram, readMetric } from './metrics.ts';

/** Labels of every sample, by name. */
export type Labels = Record<string, string>;

/** A histogram whose buckets live in the pages, not in prom-client. */
class PageHistogram extends Histogram {
  readonly #name: string;
  readonly #help: string;
  readonly #read: () => ReturnType<typeof readHistogram>;

  constructor(name: string, help: string, read: () => ReturnType<typeof readHistogram>) {
    super({ name, help, registers: [] });
    this.#name = name;
    this.#help = help;
    this.#read = read;
  }

  /** What prom-client builds both the text page and `get()` from; its own would show buckets that nothing fills. */
  async getForPromString(): Promise<object> {
    const { cumulative, sum } = this.#read();
    const name = this.#name;
    const value = (suffix: string, labels: object, amount: number) => ({
      metricName: `${name}${suffix}`,
      labels,
      sharedLabels: {},
      value: amount,
    });
    const values = [
      ...cumulative.map(({ le, count }) => value('_bucket', { le }, count)),
      value('_sum', {}, sum),
      value('_count', {}, cumulative.at(-1)?.count ?? 0),
    ];
    return { name, help: this.#help, type: 'histogram', aggregator: 'sum', values };
  }
}

/** Every metric of `METRICS`, with every series present from the start, at zero. `constant` labels (model_name) go on each. */
export function createRegistry(pages: readonly MetricsPage[], constant: Labels): Registry {
  const registry = new Registry();
  registry.setDefaultLabels(constant);
  for (const name of Object.keys(METRICS) as MetricName[]) {
    const spec = METRICS[name];
    if (spec.type === 'histogram') {
      // The table's type says which names are histograms; the narrowing does not follow `spec` back to `name`.
      const histogram = name as Parameters<typeof readHistogram>[1];
      registry.registerMetric(new PageHistogram(name, spec.help, () => readHistogram(pages, histogram)));
      continue;
    }
    const label = 'label' in spec ? spec.label : undefined;
    const values: readonly string[] = 'values' in spec ? spec.values : [''];
    const read = (value: string) =>
      (readMetric as (pages: readonly MetricsPage[], name: MetricName, label?: string) => number)(
        pages,
        name,
        label ? value : undefined,
      );
    const labelsOf = (value: string): Labels => (label ? { [label]: value } : {});
    const common = { name, help: spec.help, labelNames: label ? [label] : [], registers: [] };
    registry.registerMetric(
      spec.type === 'counter'
        ? new Counter({
            ...common,
            collect() {
              this.reset();
              for (const value of values) this.inc(labelsOf(value), read(value));
            },
          })
        : new Gauge({
            ...common,
            collect() {
              for (const value of values) this.set(labelsOf(value), read(value));
            },
          }),
    );
  }
  return registry;
}
