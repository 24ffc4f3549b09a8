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

const NONE = [
  'pd_kv_buffer_used_bytes',
  'pd_kv_pool_used_bytes',
  'pd_kv_blocks_used',
  'vllm:num_requests_running',
  'vllm:num_requests_waiting',
];

/** More than the context, which the producer, asked for one token, cannot see. */
const TOO_MANY = 10_000;

// Several prompts are computed before the consumer is asked, one while it is.
const CASES = SEND_TYPES.flatMap((sendType) =>
  [['Hello world', 'Once upon a time'], 'Hello world'].map((prompt) => ({ sendType, prompt })),
);

it.each(CASES)(
  '$sendType: a request that the consumer refuses leaves nothing of $prompt',
  async ({ sendType, prompt }) => {
    const ask = await start(sendType);
    expect((await ask({ prompt, max_tokens: TOO_MANY })).status).toBe(400);
    await nothingIsLeft();
  },
);

it.each(SEND_TYPES)(
  '%s: a client that goes away while producer and consumer are at work leaves nothing',
  async (sendType) => {
    const ask = await start(sendType);
    const client = new AbortController();
    const prompt = 'Once upon a time '.repeat(25);
    const asked = ask({ prompt, max_tokens: 50 }, client.signal).catch(String);
    for (const { program } of workers) await program.line(/request handed to the core/);
    client.abort();
    expect(await asked).toContain('AbortError');
    await nothingIsLeft();
    expect((await ask({ prompt, max_tokens: 2 })).status).toBe(200);
  },
);

async function start(sendType: string): Promise<(body: object, signal?: AbortSignal) => Promise<Response>> {
  const started = await startProxy();
  proxy = started;
  const args = ['--send-type', sendType, '--log-level', 'debug'];
  workers = await Promise.all([
    startWorker('producer', started, args),
    startWorker('consumer', started, args),
  ]);
  await untilListed(started, 1, 1);
  return (body, signal) =>
    fetch(`${started.url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(body),
      ...(signal && { signal }),
    });
}

async function nothingIsLeft(): Promise<void> {
  for (const { program } of workers) await program.line(/KV of a request released/);
  const deadline = performance.now() + 60_000;
  for (const worker of workers) {
    for (;;) {
      const metrics = await metricsOf(worker);
      if (NONE.every((name) => (metrics.get(name) ?? 0) === 0)) break;
      if (performance.now() > deadline)
        throw new Error(`${worker.role} holds ${JSON.stringify([...metrics])}`);
      await new Promise((resolve) => setTimeout(resolve, 20)); // memory is freed without an event to await from outside
    }
    expect((await metricsOf(worker)).get('pd_kv_orphans_freed_total') ?? 0).toBe(0);
  }
}
