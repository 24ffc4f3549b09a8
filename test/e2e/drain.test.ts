/** SIGTERM loses nothing: what a producer has answered for, it hands over before it ends. */
import { afterEach, expect, it } from 'vitest';
import { parseHostPort } from '../../src/net/address.ts';
import { proxyRequestId } from '../../src/wire/ids.ts';
import { metricsOf, startWorker, type WorkerHandle } from '../support/cluster.ts';

let workers: WorkerHandle[] = [];
afterEach(async () => {
  await Promise.all(workers.map(({ program }) => program.stop()));
  workers = [];
});

function complete(worker: WorkerHandle, id: string, maxTokens: number): Promise<Response> {
  return fetch(`${worker.url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'x-request-id': id },
    body: JSON.stringify({
      prompt: 'What is the capital of France?',
      max_tokens: maxTokens,
      temperature: 0,
    }),
  });
}

async function pair(args: readonly string[] = []) {
  const common = ['--send-type', 'GET', '--kv-load-failure', 'fail', ...args];
  const [producer, consumer] = await Promise.all([
    startWorker('producer', undefined, common),
    startWorker('consumer', undefined, common),
  ]);
  workers = [producer, consumer];
  const addresses = [parseHostPort(producer.kvAddress), parseHostPort(consumer.kvAddress)] as const;
  const id = proxyRequestId(...addresses, 'ab'.repeat(16));
  expect((await complete(producer, id, 1)).status).toBe(200);
  return { producer, consumer, id };
}

it('a producer keeps KV that has not been fetched until it is', async () => {
  const { producer, consumer, id } = await pair();
  const ended = producer.program.stop('SIGTERM');
  await producer.program.line(/bytes of KV are still to leave/);
  expect((await complete(producer, `${id}0`, 1)).status).toBe(503);
  const answer = await complete(consumer, id, 8);
  const body: unknown = await answer.json();
  expect(body).toMatchObject({ choices: [{ text: expect.stringContaining('Paris') }] });
  expect((await metricsOf(consumer)).get('pd_kv_loads_total{result="ok"}')).toBe(1);
  expect(await ended).toBe(0);
});

it('but no longer than the drain timeout', async () => {
  const { producer } = await pair(['--drain-timeout', '200ms']);
  expect(await producer.program.stop('SIGTERM')).toBe(0);
  expect(producer.program.tail()).toContain('bytes of KV that no consumer has fetched');
});
