/**
 * Metrics by instance. Routers of others call an instance `worker` and count the same things by that label, so it is that here. Series are
 * made when somebody looks, from what the registry has then: an instance that has gone has none, and there are never more than it holds.
 */
import type { Registry } from 'prom-client';
import { ReadHistogram, readCounter, readGauge } from '../observability/registry.ts';
import type { BreakerState } from './breaker.ts';
import type { Instance, InstanceRegistry } from './registry.ts';
import type { InstanceTally } from './tally.ts';

/** As other routers number them. */
const BREAKER_STATES: Readonly<Record<BreakerState, number>> = { closed: 0, open: 1, 'half-open': 2 };

const LABELS = ['worker', 'role'];
const labelsOf = ({ httpAddress, role }: Instance) => ({ worker: httpAddress, role });

export function watchInstances(instances: InstanceRegistry, registers: Registry[]): void {
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
        ...of(instances.tallyOf(instance)!).read(),
      }));
    registers[0]!.registerMetric(new ReadHistogram({ name, help, read }));
  };

  gauge(
    'pd_proxy_worker_requests_active',
    'Requests that this proxy has under way at an instance; a producer is done with one once its prompt is computed',
    (instance) => instances.workOf(instance)?.own,
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
    (instance) => (instance.load ? instances.workOf(instance)?.kvUse : undefined),
  );
  gauge(
    'pd_proxy_worker_breaker_state',
    'Whether an instance is let alone: 0 closed (it is asked), 1 open, 2 half-open (one request tries)',
    (instance) => BREAKER_STATES[instances.breakerOf(instance)?.state ?? 'closed'],
  );
  gauge(
    'pd_proxy_worker_draining',
    '1 where an operator has it take nothing new (POST /admin/drain), else 0',
    (instance) => Number(instances.draining(instance)),
  );
  counter(
    'pd_proxy_worker_ejections_total',
    'Times that the breaker of an instance has opened',
    (instance) => instances.breakerOf(instance)?.ejections ?? 0,
  );
  counter(
    'pd_proxy_worker_retries_total',
    'Requests that went to another pair because an instance did not take them',
    (instance) => instances.tallyOf(instance)?.retries ?? 0,
  );
  const policy = ({ role }: Instance) => instances.policyOf(role);
  readCounter({
    name: 'pd_proxy_worker_selections_total',
    help: 'Requests that were to go to an instance, by the policy of its role',
    labelNames: [...LABELS, 'policy'],
    registers,
    read: () =>
      instances.list().map((instance) => {
        const { requests } = instances.tallyOf(instance)!.placed;
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
        const { cached, uncached } = instances.tallyOf(instance)!.placed;
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
          Object.entries(instances.tallyOf(instance)!.outcomes).map(
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
