/** KV that no request will claim is freed on both ends at once, in every mode; real processes, orphan deadline at its default of 60 s. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { SEND_TYPES } from '../../src/wire/messages.ts';
import {
  metricsOf,
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from '../support/cluster.ts';
import { eventually } from '../support/requests.ts';
import { rows } from '../support/rows.ts';

const NONE = [
  'pd_kv_buffer_used_bytes',
  'pd_kv_pool_used_bytes',
  'pd_kv_blocks_used',
  'vllm:num_requests_running',
  'vllm:num_requests_waiting',
];

/** More than the context, which the producer, asked for one token, cannot see. */
const TOO_MANY = 10_000;

const MODES = rows(
  [['native']],
  SEND_TYPES.map((sendType) => ['frozen', '--send-type', sendType]),
);

describe.each(MODES)('--wire %s %s %s', (...mode) => {
  let proxy: ProxyHandle;
  let workers: WorkerHandle[] = [];
  beforeAll(async () => {
    proxy = await startProxy();
    const args = ['--wire', ...mode, '--log-level', 'debug'];
    workers = await Promise.all([startWorker('producer', proxy, args), startWorker('consumer', proxy, args)]);
    await untilListed(proxy, 1, 1);
  });
  afterAll(async () => {
    await Promise.all([...workers, proxy].map((handle) => handle?.program.stop()));
  });

  const ask = (body: object, signal?: AbortSignal) =>
    fetch(`${proxy.url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(body),
      ...(signal && { signal }),
    });

  /** Where the logs of the workers end now. */
  const here = () => workers.map(({ program }) => program.lines.length);

  async function nothingIsLeft(since: readonly number[]): Promise<void> {
    for (const [i, worker] of workers.entries()) {
      await worker.program.line(/KV of a request released/, 60_000, since[i]);
      // memory is freed without an event to await from outside
      await eventually(`nothing is left at the ${worker.role}`, 60_000, async () => {
        const metrics = await metricsOf(worker);
        return NONE.every((name) => (metrics.get(name) ?? 0) === 0);
      });
      expect((await metricsOf(worker)).get('pd_kv_orphans_freed_total') ?? 0).toBe(0);
    }
  }

  // Several prompts are computed before the consumer is asked, one while it is.
  test.each([[['Hello world', 'Once upon a time']], ['Hello world']])(
    'a request that the consumer refuses leaves nothing of %j',
    async (prompt) => {
      const since = here();
      expect((await ask({ prompt, max_tokens: TOO_MANY })).status).toBe(400);
      await nothingIsLeft(since);
    },
  );

  test('a client that goes away while producer and consumer are at work leaves nothing', async () => {
    const since = here();
    const client = new AbortController();
    const prompt = 'Once upon a time '.repeat(25);
    // Far more tokens than the machine can make until this process has read both lines.
    const asked = ask({ prompt, max_tokens: 1_500, ignore_eos: true }, client.signal).catch(String);
    for (const [i, { program }] of workers.entries()) {
      await program.line(/request handed to the core/, 60_000, since[i]);
    }
    client.abort();
    expect(await asked).toContain('AbortError');
    await nothingIsLeft(since);
    expect((await ask({ prompt, max_tokens: 2 })).status).toBe(200);
  });
});
