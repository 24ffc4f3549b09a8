/** A prom-client registry over metrics pages: each scrape reads the shared memory. */
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import { METRICS, type MetricName, type MetricsPage, readHistogram, readMetric } from './metrics.ts';

/** Labels of every sample, by name. */
export type Labels = Record<string, string>;

/** One series of a histogram. */
interface HistogramSeries {
  readonly labels: Labels;
  readonly cumulative: readonly { readonly le: number | '+Inf'; readonly count: number }[];
  readonly sum: number;
}

/** A histogram whose buckets are elsewhere, and read when somebody looks. */
export class ReadHistogram extends Histogram {
  readonly #what: { readonly name: string; readonly help: string };
  readonly #read: () => readonly HistogramSeries[];

  constructor({ name, help, read }: { name: string; help: string; read: () => readonly HistogramSeries[] }) {
    super({ name, help, registers: [] });
    this.#what = { name, help };
    this.#read = read;
  }

  /** What prom-client builds both the text page and `get()` from; its own would show buckets that nothing fills. */
  async getForPromString(): Promise<object> {
    const { name } = this.#what;
    const values = this.#read().flatMap(({ labels: sharedLabels, cumulative, sum }) => {
      const value = (suffix: string, labels: object, amount: number) => ({
        metricName: `${name}${suffix}`,
        labels,
        sharedLabels,
        value: amount,
      });
      return [
        ...cumulative.map(({ le, count }) => value('_bucket', { le }, count)),
        value('_sum', {}, sum),
        value('_count', {}, cumulative.at(-1)?.count ?? 0),
      ];
    });
    return { ...this.#what, type: 'histogram', aggregator: 'sum', values };
  }
}

interface ReadMetric {
  readonly name: string;
  readonly help: string;
  readonly labelNames: readonly string[];
  readonly registers: Registry[];
  /** Every series that there is now. */
  readonly read: () => Iterable<readonly [Labels, number]>;
}

/** A counter whose counts are elsewhere, and read when somebody looks. */
export function readCounter({ read, ...spec }: ReadMetric): Counter {
  return new Counter({
    ...spec,
    collect() {
      this.reset();
      for (const [labels, value] of read()) this.inc(labels, value);
    },
  });
}

/** Likewise. */
export function readGauge({ read, ...spec }: ReadMetric): Gauge {
  return new Gauge({
    ...spec,
    collect() {
      this.reset();
      for (const [labels, value] of read()) this.set(labels, value);
    },
  });
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
      const read = () => [{ labels: {}, ...readHistogram(pages, histogram) }];
      registry.registerMetric(new ReadHistogram({ name, help: spec.help, read }));
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
    const common = {
      name,
      help: spec.help,
      labelNames: label ? [label] : [],
      registers: [registry],
      read: () => values.map((value) => [label ? { [label]: value } : {}, read(value)] as const),
    };
    if (spec.type === 'counter') readCounter(common);
    else readGauge(common);
  }
  return registry;
}
