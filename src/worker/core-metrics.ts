/** What the core thread counts on its metrics page. */

import type { LoadFailurePolicy } from '../config/worker-config.ts';
import type { LoadOutcome } from '../connector/connector.ts';
import type { MetricsPage } from '../observability/metrics.ts';
import type { SchedulerStats } from '../scheduler/pool.ts';
import type { Scheduler } from '../scheduler/scheduler.ts';
import type { FinishReason, RequestOutput } from '../scheduler/types.ts';

export class CoreMetrics {
  readonly #page: MetricsPage;
  /** Totals counted so far; a page knows increments only. */
  #counted: SchedulerStats = { preemptions: 0, prefixQueries: 0, prefixHits: 0 };

  constructor(page: MetricsPage) {
    this.#page = page;
  }

  outputs(outputs: readonly RequestOutput[]): void {
    const page = this.#page;
    for (const { tokens, promptSource, finishReason } of outputs) {
      if (tokens.length > 0) page.inc('vllm:generation_tokens_total', tokens.length);
      if (promptSource) {
        const { computed, loaded, cached } = promptSource;
        page.inc('vllm:prompt_tokens_total', computed + loaded + cached);
        page.inc('pd_prompt_tokens_total', computed, 'computed');
        page.inc('pd_prompt_tokens_total', loaded, 'loaded');
        page.inc('pd_prompt_tokens_total', cached, 'cached');
      }
      if (finishReason) this.finished(finishReason);
    }
  }

  step(tokens: number): void {
    this.#page.inc('pd_step_tokens_total', tokens);
  }

  finished(reason: FinishReason): void {
    this.#page.inc('vllm:request_success_total', 1, reason);
  }

  /** A load that its request's abort ended counts as nothing. */
  load(outcome: LoadOutcome, policy: LoadFailurePolicy): void {
    if (outcome.ok) this.#page.inc('pd_kv_loads_total', 1, 'ok');
    else if (outcome.error.code !== 'REQUEST_ABORTED') {
      this.#page.inc('pd_kv_loads_total', 1, policy === 'fail' ? 'failed' : 'recomputed');
    }
  }

  scheduler(scheduler: Scheduler): void {
    const page = this.#page;
    const { used, total } = scheduler.blocks;
    page.set('vllm:num_requests_running', scheduler.numRunning);
    page.set('vllm:num_requests_waiting', scheduler.numWaiting);
    page.set('pd_requests_loading', scheduler.numLoading);
    page.set('pd_kv_blocks_used', used);
    page.set('pd_kv_blocks', total);
    page.set('vllm:kv_cache_usage_perc', total > 0 ? used / total : 0);
    const { preemptions, prefixQueries, prefixHits } = scheduler.stats;
    page.inc('vllm:num_preemptions_total', preemptions - this.#counted.preemptions);
    page.inc('vllm:prefix_cache_queries_total', prefixQueries - this.#counted.prefixQueries);
    page.inc('vllm:prefix_cache_hits_total', prefixHits - this.#counted.prefixHits);
    this.#counted = { preemptions, prefixQueries, prefixHits };
  }
}
