/** KV that no request will claim is freed on both ends at once, in every mode; real processes, orphan deadline at its default of 60 s. */
import { afterEach, expect, it } from 'vitest';
import { SEND_TYPES } from '../../src/transfer/types.ts';
import {
  metricsOf,
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from '../support/cluster.ts';

let proxy: ProxyHandle | undefined;
let workers: WorkerHandle[] = [];
afterEach(async () => {
  await Promise.all([...workers.map(({ program }) => program.stop()), proxy?.program.stop()]);
  workers = [];
});

const HELD = ['pd_kv_buffer_used_bytes', 'pd_kv_pool_used_bytes', 'pd_kv_blocks_used'];

// Several prompts are computed before the consumer is asked, one while it is.
const CASES = SEND_TYPES.flatMap((sendType) =>
  [['Hello world', 'Once upon a time'], 'Hello world'].map((prompt) => ({ sendType, prompt })),
);

it.each(CASES)(
  '$sendType: a request that the consumer refuses leaves nothing of $prompt',
  async ({ sendType, prompt }) => {
    const started = await startProxy();
    proxy = started;
    const args = ['--send-type', sendType, '--log-level', 'debug'];
    workers = await Promise.all([
      startWorker('producer', started, args),
      startWorker('consumer', started, args),
    ]);
    await untilListed(started, 1, 1);
    // More than the context, which the producer, asked for one token, cannot see.
    const response = await fetch(`${started.url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ prompt, max_tokens: 10_000 }),
    });
    expect(response.status).toBe(400);
    for (const { program } of workers) await program.line(/KV of a request released/);
    const deadline = performance.now() + 20_000;
    for (const worker of workers) {
      for (;;) {
        const metrics = await metricsOf(worker);
        if (HELD.every((name) => (metrics.get(name) ?? 0) === 0)) break;
        if (performance.now() > deadline)
          throw new Error(`${worker.role} holds ${JSON.stringify([...metrics])}`);
        await new Promise((resolve) => setTimeout(resolve, 20)); // memory is freed without an event to await from outside
      }
      expect((await metricsOf(worker)).get('pd_kv_orphans_freed_total') ?? 0).toBe(0);
    }
  },
  60_000,
);
