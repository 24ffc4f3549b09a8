/** SIGTERM loses nothing: what a producer has answered for, it hands over before it ends. */
import { afterEach, expect, it } from 'vitest';
import { type HostPort, parseHostPort } from '../../src/net/address.ts';
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

async function start(role: 'producer' | 'consumer', args: readonly string[] = []): Promise<WorkerHandle> {
  const common = ['--send-type', 'GET', '--kv-load-failure', 'fail'];
  const worker = await startWorker(role, undefined, [...common, ...args]);
  workers.push(worker);
  return worker;
}

/** Has the producer compute a prompt for the consumer at `address`; its id. */
async function prefilled(producer: WorkerHandle, address: HostPort): Promise<string> {
  const id = proxyRequestId(parseHostPort(producer.kvAddress), address, 'ab'.repeat(16));
  expect((await complete(producer, id, 1)).status).toBe(200);
  return id;
}

it('a producer keeps KV that has not been fetched until it is', async () => {
  const [producer, consumer] = await Promise.all([start('producer'), start('consumer')]);
  const id = await prefilled(producer, parseHostPort(consumer.kvAddress));
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
  const producer = await start('producer', ['--drain-timeout', '200ms']);
  await prefilled(producer, { host: '127.0.0.1', port: 1 });
  expect(await producer.program.stop('SIGTERM')).toBe(0);
  expect(producer.program.tail()).toContain('bytes of KV that no consumer has fetched');
});
