/** A mix of requests through two producers and two consumers, beside an undivided worker. */
import { expect } from 'vitest';
import { inParallel } from '../../bench/measure/parallel.ts';
import {
  metricsOf,
  type ProxyHandle,
  startProxy,
  startWorker,
  untilListed,
  type WorkerHandle,
} from './cluster.ts';
import { kvMovedProblems } from './kv-moved.ts';
import { complete, eventually, mixedRequests } from './requests.ts';

const STRICT = ['--kv-load-failure', 'fail'];

/** Text equals the undivided worker's, KV moved, and nothing is left behind. */
export async function expectMixedLoad(
  sendType: 'PUT_ASYNC' | 'PUT' | 'GET',
  count: number,
  undivided: WorkerHandle,
  wire: 'auto' | 'frozen',
): Promise<void> {
  const proxy: ProxyHandle = await startProxy();
  const args = [...STRICT, '--send-type', sendType, '--wire', wire];
  const producers = await Promise.all([0, 1].map(() => startWorker('producer', proxy, args)));
  const consumers = await Promise.all([0, 1].map(() => startWorker('consumer', proxy, args)));
  const all = [...producers, ...consumers];
  try {
    await untilListed(proxy, 2, 2);
    const requests = mixedRequests(count, 7);
    const expected = await inParallel(requests, 16, (request) => complete(undivided.url, request));
    const before = await Promise.all(consumers.map(metricsOf));
    const answers = await inParallel(requests, 16, (request) => complete(proxy.url, request));
    const after = await Promise.all(consumers.map(metricsOf));

    expect(answers.map((answer) => answer.error ?? answer.text)).toEqual(
      expected.map((answer) => answer.text),
    );
    expect(answers.map((answer) => answer.finishReason)).toEqual(
      expected.map((answer) => answer.finishReason),
    );
    expect(answers.map((answer) => answer.completionTokens)).toEqual(
      expected.map((answer) => answer.completionTokens),
    );
    expect(
      kvMovedProblems(
        before,
        after,
        answers.map((answer) => answer.promptTokens),
        { wire: wire === 'auto' ? 'native' : wire },
      ),
    ).toEqual([]);
    for (const answer of answers) {
      expect(answer.id).toMatch(/^cmpl-___prefill_addr_127\.0\.0\.1:\d+___decode_addr_127\.0\.0\.1:\d+_/);
    }
    await eventually('KV accounting of all four is back to zero', 60_000, async () => {
      const pages = await Promise.all(all.map(metricsOf));
      return pages.every((page) =>
        ['pd_kv_buffer_used_bytes', 'pd_kv_pool_used_bytes', 'pd_kv_blocks_used'].every(
          (name) => page.get(name) === 0,
        ),
      );
    });
    // SIGTERM drains and ends: exit 0 from every one, so nothing crashed on the way out either.
    for (const worker of all) expect(await worker.program.stop()).toBe(0);
    expect(await proxy.program.stop()).toBe(0);
  } finally {
    for (const program of [...all.map((worker) => worker.program), proxy.program])
      await program.stop('SIGKILL');
  }
}
