/** The proxy's metrics. */
import {
  AggregatorRegistry,
  Counter,
  Gauge,
  type MetricObjectWithValues,
  type MetricValue,
  Registry,
} from 'prom-client';
import { ReadHistogram, readCounter, readGauge } from '../observability/registry.ts';
import type { BreakerState } from './breaker.ts';
import type { Instance, InstanceRegistry, InstanceRole } from './registry.ts';
import { Counts, Durations, type InstanceTally, RouteTally } from './tally.ts';

export type ProxyMetrics = ReturnType<typeof createProxyMetrics>;

/** Of one process, as it travels to another. */
export type ExportedMetrics = readonly MetricObjectWithValues<MetricValue<string>>[];

/** Counts of several processes together, in Prometheus' text form. */
export function sumMetrics(exported: readonly ExportedMetrics[]): Promise<string> {
  return AggregatorRegistry.aggregate(exported as object[]).metrics();
}

/** What a process that has gone had counted, with what others before it had; what is so many at a time is not, as it has no more of it. */
export async function addCounts(before: ExportedMetrics, gone: ExportedMetrics): Promise<ExportedMetrics> {
  const counted = gone.filter(({ type }) => String(type) !== 'gauge');
  return await AggregatorRegistry.aggregate([before, counted] as object[]).getMetricsAsJSON();
}

/** What is not counted but looked at. */
interface Watched {
  readonly instances: InstanceRegistry;
  /** How many blocks instances have said that they have. */
  readonly cachedBlocks: () => number;
  /** Requests in the queue. */
  readonly queued: () => number;
}

const ROLES: readonly InstanceRole[] = ['producer', 'consumer'];

/** `watched`: absent in a process that owns nothing of it. */
export function createProxyMetrics(watched?: Watched) {
  const registry = new Registry();
  const registers = [registry];
  if (watched) watch(watched, registers);
  const durations = (name: string, help: string) => {
    const seconds = new Durations();
    const read = () => [{ labels: {}, ...seconds.read() }];
    registry.registerMetric(new ReadHistogram({ name, help, read }));
    return seconds;
  };
  const placedTokens = { producer: new Counts<'yes' | 'no'>(), consumer: new Counts<'yes' | 'no'>() };
  readCounter({
    name: 'pd_proxy_placed_tokens_total',
    help: 'Prompt tokens of placed requests, by whether the instance was thought to have them cached; about, and without kv-aware none are',
    labelNames: ['role', 'cached'],
    registers,
    read: () =>
      ROLES.flatMap((role) =>
        [...placedTokens[role].read()].map(([cached, count]) => [{ role, cached }, count] as const),
      ),
  });
  const keyRequests = new Counts<string>();
  readCounter({
    name: 'pd_proxy_key_requests_total',
    help: 'Requests by the name of the key they came with',
    labelNames: ['key'],
    registers,
    read: () => [...keyRequests.read()].map(([key, count]) => [{ key }, count] as const),
  });
  return {
    registry,
    routeOf: watchRoutes(registry),
    placedTokens,
    keyRequests,
    prefillSeconds: durations(
      'pd_proxy_prefill_seconds',
      'From asking the producer to the end of its answer, successful ones',
    ),
    firstEventSeconds: durations(
      'pd_proxy_time_to_first_token_seconds',
      'Streamed requests: from arrival to the first event passed on',
    ),
    queueSeconds: durations(
      'pd_proxy_queue_seconds',
      'From a request that has been read to its turn; those turned away are not in it',
    ),
    feedsLost: new Counter({
      name: 'pd_proxy_kv_events_lost_total',
      help: 'Times that what an instance says of its cache could not be followed: gap (some missing), invalid, flood (too much)',
      labelNames: ['reason'],
      registers,
    }),
    inFlight: new Gauge({
      name: 'pd_proxy_requests_in_flight',
      help: 'Requests under way',
      registers,
    }),
    turnedAway: new Counter({
      name: 'pd_proxy_turned_away_total',
      help: 'Requests answered 429: full (the queue was full), displaced (by one with more claim to it), late (waited too long)',
      labelNames: ['reason'],
      registers,
    }),
    retries: new Counter({
      name: 'pd_proxy_retries_total',
      help: 'Instances that did not take a request, by whether another pair was tried or too many had been of late',
      labelNames: ['result'],
      registers,
    }),
    replaced: new Counter({
      name: 'pd_proxy_pairs_replaced_total',
      help: 'Requests that went to a second pair because an instance did not take them',
      registers,
    }),
    overlapped: new Counter({
      name: 'pd_proxy_overlapped_total',
      help: 'Pairs whose consumer was asked while the producer was at work',
      registers,
    }),
    tokenized: new Counter({
      name: 'pd_proxy_prompts_tokenized_total',
      help: 'Prompts of text that were to be tokenized (--tokenizer): done, none (no prompt that workers take), busy (too many waited), failed',
      labelNames: ['result'],
      registers,
    }),
    bypassed: new Counter({
      name: 'pd_proxy_bypassed_total',
      help: 'Requests that a consumer computed alone: little (of their prompts was not cached there, --bypass-tokens), wait (at the producer, --bypass-wait)',
      labelNames: ['reason'],
      registers,
    }),
    keysRefused: new Counter({
      name: 'pd_proxy_keys_refused_total',
      help: 'Requests answered 401 or 403: missing, unknown, expired, or forbidden (an admin call with a key that is none)',
      labelNames: ['reason'],
      registers,
    }),
    traceSpans: new Counter({
      name: 'pd_proxy_trace_spans_total',
      help: 'Spans for --otlp-endpoint: exported, failed (the receiver did not take them), dropped (too many waited)',
      labelNames: ['result'],
      registers,
    }),
    badPings: new Counter({
      name: 'pd_proxy_bad_pings_total',
      help: 'Pings that could not be used',
      registers,
    }),
  };
}

/** Returns what is counted of requests to a path, of which there are few. */
function watchRoutes(registry: Registry): (route: string) => RouteTally {
  const tallies = new Map<string, RouteTally>();
  const series = <Name extends string | number>(label: string, of: (tally: RouteTally) => Counts<Name>) =>
    [...tallies].flatMap(([route, tally]) =>
      [...of(tally).read()].map(([name, count]) => [{ route, [label]: String(name) }, count] as const),
    );
  const registers = [registry];
  readCounter({
    name: 'pd_proxy_requests_total',
    help: 'Requests by route and by the status that the client got; 499: it went away',
    labelNames: ['route', 'status'],
    registers,
    read: () => series('status', ({ statuses }) => statuses),
  });
  readCounter({
    name: 'pd_proxy_request_errors_total',
    help: 'Requests that the proxy answered or ended with an error of its own, by route and code (docs/errors.md)',
    labelNames: ['route', 'code'],
    registers,
    read: () => series('code', ({ errors }) => errors),
  });
  registry.registerMetric(
    new ReadHistogram({
      name: 'pd_proxy_request_duration_seconds',
      help: 'From the arrival of a request to the end of its answer, by route',
      read: () => [...tallies].map(([route, { seconds }]) => ({ labels: { route }, ...seconds.read() })),
    }),
  );
  return (route) => {
    const tally = tallies.get(route) ?? new RouteTally();
    tallies.set(route, tally);
    return tally;
  };
}

function watch({ instances, cachedBlocks, queued }: Watched, registers: Registry[]): void {
  watchInstances(instances, registers);
  const gauge = (name: string, help: string, read: () => number) =>
    readGauge({ name, help, labelNames: [], registers, read: () => [[{}, read()]] });
  const byRole = (name: string, help: string, counts: (instance: Instance) => boolean) =>
    readGauge({
      ...{ name, help, labelNames: ['role'], registers },
      read: () => ROLES.map((role) => [{ role }, instances.list(role).filter(counts).length] as const),
    });
  byRole('pd_proxy_instances', 'Instances whose pings arrive, by role', () => true);
  gauge('pd_proxy_requests_queued', 'Requests that wait for their turn', queued);
  byRole(
    'pd_proxy_instances_ejected',
    'Instances that are let alone because they failed or were slow, by role',
    (one) => instances.standing(one)?.breaker.state === 'open',
  );
  gauge('pd_proxy_cached_blocks', 'Blocks that instances have said they have cached', cachedBlocks);
}

/** As other routers number them. */
const BREAKER_STATES: Readonly<Record<BreakerState, number>> = { closed: 0, open: 1, 'half-open': 2 };

const LABELS = ['worker', 'role'];
const labelsOf = ({ httpAddress, role }: Instance) => ({ worker: httpAddress, role });

/**
 * By instance. Routers of others call an instance `worker` and count the same things by that label, so it is that here. Series are made when
 * somebody looks, from what the registry has then: an instance that has gone has none, and there are never more than it holds.
 */
function watchInstances(instances: InstanceRegistry, registers: Registry[]): void {
  const gauge = (name: string, help: string, read: (instance: Instance) => number | undefined) =>
    readGauge({
      ...{ name, help, labelNames: LABELS, registers },
      read: () =>
        instances.list().flatMap((instance) => {
          const value = read(instance);
          return value === undefined ? [] : [[labelsOf(instance), value] as const];
        }),
    });
  const counter = (name: string, help: string, read: (instance: Instance) => number) =>
    readCounter({
      ...{ name, help, labelNames: LABELS, registers },
      read: () => instances.list().map((instance) => [labelsOf(instance), read(instance)] as const),
    });
  const histogram = (
    name: string,
    help: string,
    role: Instance['role'],
    of: (tally: InstanceTally) => InstanceTally['prefill'],
  ) => {
    const read = () =>
      instances.list(role).map((instance) => ({
        labels: labelsOf(instance),
        ...of(instances.standing(instance)!.tally).read(),
      }));
    registers[0]!.registerMetric(new ReadHistogram({ name, help, read }));
  };

  gauge(
    'pd_proxy_worker_requests_active',
    'Requests that this proxy has under way at an instance; a producer is done with one once its prompt is computed',
    (instance) => instances.standing(instance)?.work.own,
  );
  gauge(
    'pd_proxy_worker_requests_running',
    'Requests in its batch, whoever sent them, as the instance tells',
    ({ load }) => load?.running,
  );
  gauge(
    'pd_proxy_worker_requests_waiting',
    'Requests outside its batch, whoever sent them, as the instance tells',
    ({ load }) => load?.waiting,
  );
  gauge(
    'pd_proxy_worker_queued_tokens',
    'Prompt tokens that are still to be computed there, as the instance tells',
    ({ load }) => load?.queuedTokens,
  );
  gauge(
    'pd_proxy_worker_kv_cache_usage_ratio',
    'Share of its KV cache that requests hold, 0 to 1, as the instance tells',
    (instance) => (instance.load ? instances.standing(instance)?.work.kvUse : undefined),
  );
  gauge(
    'pd_proxy_worker_breaker_state',
    'Whether an instance is let alone: 0 closed (it is asked), 1 open, 2 half-open (one request tries)',
    (instance) => BREAKER_STATES[instances.standing(instance)?.breaker.state ?? 'closed'],
  );
  gauge(
    'pd_proxy_worker_draining',
    '1 where an operator has it take nothing new (POST /admin/drain), else 0',
    (instance) => Number(instances.standing(instance)!.draining),
  );
  counter(
    'pd_proxy_worker_ejections_total',
    'Times that the breaker of an instance has opened',
    (instance) => instances.standing(instance)?.breaker.ejections ?? 0,
  );
  counter(
    'pd_proxy_worker_retries_total',
    'Requests that went to another pair because an instance did not take them',
    (instance) => instances.standing(instance)?.tally.retries ?? 0,
  );
  const policy = ({ role }: Instance) => instances.policyOf(role);
  readCounter({
    name: 'pd_proxy_worker_selections_total',
    help: 'Requests that were to go to an instance, by the policy of its role',
    labelNames: [...LABELS, 'policy'],
    registers,
    read: () =>
      instances.list().map((instance) => {
        const { requests } = instances.standing(instance)!.tally.placed;
        return [{ ...labelsOf(instance), policy: policy(instance) }, requests] as const;
      }),
  });
  readCounter({
    name: 'pd_proxy_worker_placed_tokens_total',
    help: 'Prompt tokens of those requests, by whether the instance was thought to have them cached; about',
    labelNames: [...LABELS, 'policy', 'cached'],
    registers,
    read: () =>
      instances.list().flatMap((instance) => {
        const labels = { ...labelsOf(instance), policy: policy(instance) };
        const { cached, uncached } = instances.standing(instance)!.tally.placed;
        return [
          [{ ...labels, cached: 'yes' }, cached],
          [{ ...labels, cached: 'no' }, uncached],
        ] as const;
      }),
  });
  readCounter({
    name: 'pd_proxy_worker_requests_total',
    help: 'What became of requests at an instance: success (answered, be it that the request was at fault), failure, refused (not taken)',
    labelNames: [...LABELS, 'outcome'],
    registers,
    read: () =>
      instances
        .list()
        .flatMap((instance) =>
          Object.entries(instances.standing(instance)!.tally.outcomes).map(
            ([outcome, count]) => [{ ...labelsOf(instance), outcome }, count] as const,
          ),
        ),
  });
  histogram(
    'pd_proxy_worker_prefill_seconds',
    'Producers: from asking to the end of the answer, successful ones',
    'producer',
    ({ prefill }) => prefill,
  );
  histogram(
    'pd_proxy_worker_time_to_first_token_seconds',
    'Consumers: streamed requests, from arrival at the proxy to the first event passed on',
    'consumer',
    ({ firstEvent }) => firstEvent,
  );
}
