/**
 * Every ten seconds of work, one line about what was done and what is under way. The last line comes after the work has ended; a
 * worker with nothing to do has no timer.
 */
import type { Logger } from '../observability/log.ts';
import { type MetricsPage, readMetric } from '../observability/metrics.ts';
import type { Scheduler } from '../scheduler/scheduler.ts';
import { Deadlines } from '../transfer/deadlines.ts';

const INTERVAL_MS = 10_000;

export interface ThroughputLogOptions {
  readonly scheduler: Pick<
    Scheduler,
    'numRequests' | 'numRunning' | 'numWaiting' | 'numLoading' | 'blocks' | 'stats'
  >;
  /** Counts prompt and generated tokens. */
  readonly page: MetricsPage;
  readonly log: Logger;
  /** For tests. */
  readonly clock?: Pick<Deadlines, 'now' | 'after'>;
}

export class ThroughputLog {
  readonly #options: ThroughputLogOptions;
  readonly #clock: Pick<Deadlines, 'now' | 'after'>;
  /** The interval under way. */
  #interval:
    | {
        readonly since: number;
        readonly before: ReturnType<typeof totalsOf>;
        readonly end: { cancel(): void };
      }
    | undefined;
  /** 0 to 1, of the last interval in which anything was looked up. */
  #prefixHitRate = 0;

  constructor(options: ThroughputLogOptions) {
    this.#options = options;
    this.#clock = options.clock ?? new Deadlines();
  }

  /** There is work. */
  working(): void {
    if (this.#interval) return;
    const end = this.#clock.after(INTERVAL_MS, () => {
      this.#write();
      if (this.#options.scheduler.numRequests > 0) this.working();
    });
    this.#interval = { since: this.#clock.now(), before: totalsOf(this.#options), end };
  }

  /** Writes what the interval under way has come to. Idempotent. */
  close(): void {
    this.#interval?.end.cancel();
    this.#write();
  }

  #write(): void {
    const { scheduler, log } = this.#options;
    const interval = this.#interval;
    if (!interval) return;
    this.#interval = undefined;
    const { since, before } = interval;
    const now = totalsOf(this.#options);
    const seconds = Math.max(this.#clock.now() - since, 1) / 1_000;
    const queries = now.prefixQueries - before.prefixQueries;
    if (queries > 0) this.#prefixHitRate = (now.prefixHits - before.prefixHits) / queries;
    const { used, total } = scheduler.blocks;
    const fields = {
      promptTokensPerSecond: rounded((now.promptTokens - before.promptTokens) / seconds),
      generationTokensPerSecond: rounded((now.generationTokens - before.generationTokens) / seconds),
      running: scheduler.numRunning,
      waiting: scheduler.numWaiting,
      loading: scheduler.numLoading,
      kvCacheUsagePercent: rounded(total > 0 ? (100 * used) / total : 0),
      prefixHitPercent: rounded(100 * this.#prefixHitRate),
    };
    log.info(
      fields,
      `in ${seconds.toFixed(1)} s: prompt throughput ${fields.promptTokensPerSecond.toFixed(1)} tokens/s, ` +
        `generation throughput ${fields.generationTokensPerSecond.toFixed(1)} tokens/s; ` +
        `running ${fields.running}, waiting ${fields.waiting}, loading ${fields.loading}; ` +
        `KV cache usage ${fields.kvCacheUsagePercent.toFixed(1)} %, ` +
        `prefix cache hit rate ${fields.prefixHitPercent.toFixed(1)} %`,
    );
  }
}

/** Since the start. */
function totalsOf({ page, scheduler: { stats } }: ThroughputLogOptions) {
  return {
    ...stats,
    promptTokens: readMetric([page], 'vllm:prompt_tokens_total'),
    generationTokens: readMetric([page], 'vllm:generation_tokens_total'),
  };
}

function rounded(value: number): number {
  return Math.round(10 * value) / 10;
}
