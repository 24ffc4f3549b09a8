/** What is wrong with a page of Prometheus's text format: the rules of `promtool check metrics`, for machines that have none. */

const LINE = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)$/;
const LABEL = /([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"(?:,|$)/gy;
const SERIES_OF_HISTOGRAM = /_(bucket|sum|count)$/;

/** Words of a name for which Prometheus has a base unit: seconds, bytes, ratio, meters, grams, joules, volts, amperes, celsius. */
const OTHER_UNITS = new Set(
  [
    'minute',
    'hour',
    'day',
    'week',
    'percent',
    'bit',
    'kilobyte',
    'megabyte',
    'gigabyte',
    'kibibyte',
    'mebibyte',
    'gibibyte',
  ]
    .concat(['milli', 'micro', 'nano'].flatMap((prefix) => [`${prefix}second`, `${prefix}byte`]))
    .flatMap((unit) => [unit, `${unit}s`]),
);
const ABBREVIATIONS = new Set([
  's',
  'ms',
  'us',
  'ns',
  'sec',
  'b',
  'kb',
  'mb',
  'gb',
  'tb',
  'kib',
  'mib',
  'gib',
  'h',
  'd',
]);
const TYPES = ['counter', 'gauge', 'histogram', 'summary', 'untyped'];

interface Family {
  readonly name: string;
  help?: string;
  type?: string;
  readonly samples: {
    readonly name: string;
    readonly labels: readonly [string, string][];
    readonly value: string;
  }[];
}

/** One line per fault; empty where the page is clean. `foreign`: a prefix of names that are another's choice, colon and all. */
export function lintExposition(page: string, foreign = 'vllm:'): string[] {
  const faults: string[] = [];
  const families = new Map<string, Family>();
  const familyOf = (name: string): Family => {
    const family = families.get(name) ?? { name, samples: [] };
    families.set(name, family);
    return family;
  };
  const seen = new Set<string>();
  for (const line of page.split('\n')) {
    const comment = /^# (HELP|TYPE) (\S+) ?(.*)$/.exec(line);
    if (comment) {
      const [, kind, name = '', text = ''] = comment;
      const family = familyOf(name);
      const key = kind === 'HELP' ? 'help' : 'type';
      if (family[key] !== undefined) faults.push(`${name}: a second ${kind}`);
      family[key] = text;
      continue;
    }
    if (line === '' || line.startsWith('#')) continue;
    const sample = LINE.exec(line);
    if (!sample) {
      faults.push(`no sample: ${line}`);
      continue;
    }
    const [, name = '', inside = '', value = ''] = sample;
    if (seen.has(`${name}{${inside}}`)) faults.push(`${name}{${inside}}: twice`);
    seen.add(`${name}{${inside}}`);
    const labels = [...inside.matchAll(LABEL)].map(([, label = '', of = '']): [string, string] => [
      label,
      of,
    ]);
    if (labels.map(([label, of]) => `${label}="${of}"`).join(',') !== inside)
      faults.push(`labels of: ${line}`);
    if (Number.isNaN(Number(value)) && !/^([+-]Inf|NaN)$/.test(value)) faults.push(`value of: ${line}`);
    const base = name.replace(SERIES_OF_HISTOGRAM, '');
    familyOf(families.get(base)?.type === 'histogram' ? base : name).samples.push({ name, labels, value });
  }
  for (const family of families.values()) faults.push(...lintFamily(family, foreign));
  return faults;
}

function lintFamily({ name, help, type, samples }: Family, foreign: string): string[] {
  const own = name.startsWith(foreign) ? name.slice(foreign.length) : name;
  const words = own.split('_');
  const labels = new Set(samples.flatMap((sample) => sample.labels.map(([label]) => label)));
  const rules: [fault: boolean, text: string][] = [
    [!help, 'no HELP'],
    [!type || !TYPES.includes(type), `TYPE ${type}`],
    [own.includes(':'), 'a colon is for recording rules'],
    [type === 'counter' && !own.endsWith('_total'), 'a counter ends in _total'],
    [type !== 'counter' && own.endsWith('_total'), 'only a counter ends in _total'],
    [type !== 'histogram' && SERIES_OF_HISTOGRAM.test(own), 'only series of a histogram end so'],
    [type !== 'histogram' && labels.has('le'), 'only a histogram has the label le'],
    [words.some((word) => TYPES.includes(word)), 'its type stands in its name'],
    [/[A-Z]/.test(own) || [...labels].some((label) => /[A-Z]/.test(label)), 'snake_case, please'],
    [words.some((word) => OTHER_UNITS.has(word)), 'not in a base unit'],
    [words.some((word) => ABBREVIATIONS.has(word)), 'an abbreviated unit'],
  ];
  const faults = rules.filter(([fault]) => fault).map(([, text]) => `${name}: ${text}`);
  return type === 'histogram' ? [...faults, ...lintHistogram(name, samples)] : faults;
}

/** Buckets must not fall, and the last is the count. */
function lintHistogram(name: string, samples: Family['samples']): string[] {
  const series = new Map<string, { buckets: [string, number][]; count?: number; sum: boolean }>();
  for (const sample of samples) {
    const key = JSON.stringify(sample.labels.filter(([label]) => label !== 'le'));
    const one = series.get(key) ?? { buckets: [], sum: false };
    series.set(key, one);
    const bound = sample.labels.find(([label]) => label === 'le')?.[1];
    if (sample.name.endsWith('_bucket') && bound !== undefined)
      one.buckets.push([bound, Number(sample.value)]);
    else if (sample.name.endsWith('_count')) one.count = Number(sample.value);
    else if (sample.name.endsWith('_sum')) one.sum = true;
  }
  return [...series].flatMap(([key, { buckets, count, sum }]) => {
    const bounds = buckets.map(([bound]) => (bound === '+Inf' ? Number.POSITIVE_INFINITY : Number(bound)));
    const rising = buckets.every(
      ([, value], i) => i === 0 || (value >= buckets[i - 1]![1] && bounds[i]! > bounds[i - 1]!),
    );
    const [last, total] = buckets.at(-1) ?? [];
    return rising && last === '+Inf' && total === count && sum
      ? []
      : [`${name} ${key}: buckets, sum or count`];
  });
}
