/**
 * Metrics that every thread can write without sending a message: one page of doubles in shared memory per thread, with one writer. The
 * main thread sums the pages when /metrics is read, so a thread that hangs still shows its last values.
 */
import { PdError } from '../errors.ts';

const SECONDS = [
  0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
] as const;

export interface MetricSpec {
  readonly type: 'counter' | 'gauge' | 'histogram';
  readonly help: string;
  /** One label and its values, each with a slot of its own; a page has no room for free-form labels. */
  readonly label?: string;
  readonly values?: readonly string[];
  readonly buckets?: readonly number[];
}

/** Every metric of a worker. Those under `vllm:` mean what they mean in vLLM, so its dashboards work. */
export const METRICS = {
  pd_kv_loads_total: {
    type: 'counter',
    help: 'KV loads of this consumer, by outcome',
    label: 'result',
    values: ['ok', 'recomputed', 'failed'],
  },
  pd_kv_sent_bytes_total: { type: 'counter', help: 'KV bytes sent to peers' },
  pd_kv_received_bytes_total: { type: 'counter', help: 'KV bytes received from peers' },
  pd_kv_saves_failed_total: { type: 'counter', help: 'Requests whose KV could not be sent' },
  pd_kv_buffer_used_bytes: {
    type: 'gauge',
    help: 'Device bytes held for KV in transfer, below kv_buffer_size',
  },
  pd_kv_pool_used_bytes: { type: 'gauge', help: 'Host bytes held for KV in transfer, past kv_buffer_size' },
  pd_kv_orphans_freed_total: {
    type: 'counter',
    help: 'Tensors freed because no request claimed them in time',
  },
  pd_kv_late_dropped_total: { type: 'counter', help: 'Tensors dropped because their request had finished' },
  pd_kv_evicted_total: {
    type: 'counter',
    help: 'Tensors evicted from the GET send store because it was full',
  },
  pd_kv_refused_total: { type: 'counter', help: 'Announcements refused for lack of memory (answered 1)' },
  pd_kv_blocks_used: { type: 'gauge', help: 'Paged KV blocks in use' },
  pd_kv_blocks: { type: 'gauge', help: 'Paged KV blocks' },
  pd_prompt_tokens_total: {
    type: 'counter',
    help: 'Prompt tokens, by where their KV came from',
    label: 'source',
    values: ['computed', 'loaded', 'cached'],
  },
  pd_step_tokens_total: {
    type: 'counter',
    help: 'Tokens that steps have computed, of prompts and of outputs, whether their requests came to an end or not',
  },
  pd_transfer_seconds: {
    type: 'histogram',
    help: 'From the first announcement (sender) or the start of the load (receiver) until all KV of a request is in place',
    buckets: SECONDS,
  },
  pd_protocol_errors_total: {
    type: 'counter',
    help: 'Protocol violations by peers, and waits for them that reached a deadline',
    label: 'kind',
    values: [
      'malformed',
      'unknown_command',
      'bad_field',
      'limit',
      'unknown_dtype',
      'no_pair',
      'duplicate',
      'send_type',
      'fingerprint',
      'unexpected_answer',
      'timeout',
      'peer_lost',
    ],
  },
  pd_peers_refused_total: { type: 'counter', help: 'Connections refused because of --allow-peers' },
  pd_pairs_open: { type: 'gauge', help: 'Open pairs, both directions' },
  pd_native_wants: { type: 'gauge', help: 'Prompts requested by native hand-over that have not arrived' },
  pd_native_quarantined_blocks: {
    type: 'gauge',
    help: 'KV blocks kept unused because a producer that was given up on may still write to them',
  },
  pd_native_leases: { type: 'gauge', help: 'Prompts kept in this cache for their consumers' },
  pd_native_connections: {
    type: 'gauge',
    help: 'Native connections to producers, by transport',
    label: 'transport',
    values: ['direct', 'nccl', 'host'],
  },
  pd_native_fallbacks: {
    type: 'gauge',
    help: 'Native connections between GPUs that do not use direct, by reason',
    label: 'reason',
    values: ['off', 'peer_off', 'other_host', 'refused', 'late'],
  },
  pd_native_silences_total: {
    type: 'counter',
    help: 'Native connections that a producer left unanswered for seconds: answered then, answered on no connection, or renewed as it answered another',
    label: 'result',
    values: ['answered', 'nobody', 'renewed'],
  },
  pd_native_mappings: {
    type: 'gauge',
    help: 'Caches mapped for direct writes: ours, by producers; theirs, by this worker',
    label: 'cache',
    values: ['ours', 'theirs'],
  },
  pd_native_path_bytes_per_second: {
    type: 'gauge',
    help: 'Slowest measured path of direct writes to a consumer; 0 before one is measured',
  },
  pd_native_path_expected_bytes_per_second: {
    type: 'gauge',
    help: 'What direct writes reach over the link of that path; 0 if nothing is known of it',
  },
  pd_native_path_latency_seconds: {
    type: 'gauge',
    help: 'Time that a small direct write takes on that path',
  },
  pd_trace_spans_total: {
    type: 'counter',
    help: 'Spans for --otlp-endpoint: exported, failed (the receiver did not take them), dropped (too many waited)',
    label: 'result',
    values: ['exported', 'failed', 'dropped'],
  },
  'vllm:num_requests_running': { type: 'gauge', help: 'Requests in the batch' },
  'vllm:num_requests_waiting': { type: 'gauge', help: 'Requests waiting for the batch' },
  pd_requests_loading: { type: 'gauge', help: 'Requests whose KV is being loaded' },
  'vllm:kv_cache_usage_perc': { type: 'gauge', help: 'Fraction of the paged KV cache in use, 0 to 1' },
  'vllm:num_preemptions_total': { type: 'counter', help: 'Preemptions' },
  'vllm:prefix_cache_queries_total': { type: 'counter', help: 'Prompt tokens looked up in the prefix cache' },
  'vllm:prefix_cache_hits_total': { type: 'counter', help: 'Prompt tokens found in the prefix cache' },
  'vllm:prompt_tokens_total': { type: 'counter', help: 'Prompt tokens processed' },
  'vllm:generation_tokens_total': { type: 'counter', help: 'Tokens generated' },
  'vllm:request_success_total': {
    type: 'counter',
    help: 'Finished completions, by reason',
    label: 'finished_reason',
    values: ['stop', 'length', 'abort', 'error'],
  },
  'vllm:time_to_first_token_seconds': { type: 'histogram', help: 'Arrival to first token', buckets: SECONDS },
  'vllm:inter_token_latency_seconds': { type: 'histogram', help: 'Between two tokens', buckets: SECONDS },
  'vllm:e2e_request_latency_seconds': { type: 'histogram', help: 'Arrival to last token', buckets: SECONDS },
} as const satisfies Record<string, MetricSpec>;

export type MetricName = keyof typeof METRICS;
/** The names of the metrics of one type. */
export type MetricOfType<T extends MetricSpec['type']> = {
  [K in MetricName]: (typeof METRICS)[K]['type'] extends T ? K : never;
}[MetricName];
/** The label value a metric needs, or nothing. */
export type MetricLabel<K extends MetricName> = (typeof METRICS)[K] extends { values: readonly (infer V)[] }
  ? [label: V]
  : [];

const SPECS: Record<string, MetricSpec> = METRICS;

/** First slot of each metric; a histogram takes one per bucket, one for +Inf and one for the sum. */
const SLOTS = new Map<string, number>();
let slotCount = 0;
for (const [name, spec] of Object.entries(SPECS)) {
  SLOTS.set(name, slotCount);
  slotCount += spec.type === 'histogram' ? (spec.buckets?.length ?? 0) + 2 : (spec.values?.length ?? 1);
}

/** One thread's metrics. */
export class MetricsPage {
  readonly buffer: SharedArrayBuffer;
  readonly #slots: Float64Array;

  constructor(buffer: SharedArrayBuffer = new SharedArrayBuffer(slotCount * 8)) {
    this.buffer = buffer;
    this.#slots = new Float64Array(buffer);
  }

  inc<K extends MetricOfType<'counter'>>(name: K, amount: number, ...label: MetricLabel<K>): void {
    const slot = slotOf(name, label[0] as string | undefined);
    this.#slots[slot] = this.#slots[slot]! + amount;
  }

  set<K extends MetricOfType<'gauge'>>(name: K, value: number, ...label: MetricLabel<K>): void {
    this.#slots[slotOf(name, label[0] as string | undefined)] = value;
  }

  observe(name: MetricOfType<'histogram'>, seconds: number): void {
    const buckets = SPECS[name]!.buckets!;
    const base = slotOf(name);
    let bucket = 0;
    while (bucket < buckets.length && seconds > buckets[bucket]!) bucket++;
    this.#slots[base + bucket] = this.#slots[base + bucket]! + 1;
    const sum = base + buckets.length + 1;
    this.#slots[sum] = this.#slots[sum]! + seconds;
  }

  /** Raw slot, for reading. */
  at(slot: number): number {
    return this.#slots[slot]!;
  }
}

function slotOf(name: string, label?: string): number {
  const base = SLOTS.get(name);
  const values = SPECS[name]?.values;
  const index = values ? values.indexOf(label ?? '') : 0;
  if (base === undefined || index < 0) throw new PdError('INTERNAL', `no metric ${name}{${label ?? ''}}`);
  return base + index;
}

/** The value of one counter or gauge over all pages. */
export function readMetric<K extends MetricOfType<'counter' | 'gauge'>>(
  pages: readonly MetricsPage[],
  name: K,
  ...label: MetricLabel<K>
): number {
  const slot = slotOf(name, label[0] as string | undefined);
  return pages.reduce((sum, page) => sum + page.at(slot), 0);
}

/** Totals of one histogram over all pages: cumulative counts per upper bound (`+Inf` last), and the sum. */
export function readHistogram(
  pages: readonly MetricsPage[],
  name: MetricOfType<'histogram'>,
): {
  readonly cumulative: readonly { readonly le: number | '+Inf'; readonly count: number }[];
  readonly sum: number;
} {
  const base = slotOf(name);
  const total = (slot: number) => pages.reduce((sum, page) => sum + page.at(slot), 0);
  const bounds = [...SPECS[name]!.buckets!, '+Inf' as const];
  let count = 0;
  const cumulative = bounds.map((le, i) => {
    count += total(base + i);
    return { le, count };
  });
  return { cumulative, sum: total(base + bounds.length) };
}
