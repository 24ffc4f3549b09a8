/** By direct, on stand-in GPUs: a producer that stands still or dies costs its consumer time, never a wrong byte or a block. */
import { randomBytes } from 'node:crypto';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { parseHostPort } from '../../src/net/address.ts';
import { proxyRequestId } from '../../src/wire/ids.ts';
import type { CoreState } from '../../src/worker/core-messages.ts';
import { standInEnvironment } from '../stand-ins/build.ts';
import { metricsOf, startWorker, type WorkerHandle } from '../support/cluster.ts';
import { eventually } from '../support/requests.ts';

const ARGS = [
  '--executor',
  'host',
  '--kv-buffer-size',
  '64e6',
  '--transport',
  'direct',
  '--wire',
  'native',
  '--debug-state',
];
const PROMPT = 'Once upon a time in a magical forest, there lived a wise old dragon who';

let producer: WorkerHandle;
let consumer: WorkerHandle;
let undivided: WorkerHandle;
const expected = new Map<string, string>();
beforeAll(async () => {
  Object.assign(process.env, standInEnvironment());
  [producer, consumer, undivided] = await Promise.all([
    startWorker('producer', undefined, [...ARGS, '--device', 'cuda:0']),
    startWorker('consumer', undefined, [...ARGS, '--device', 'cuda:1', '--kv-load-timeout', '5s']),
    startWorker('both', undefined),
  ]);
  for (const name of ['second', 'third']) expected.set(name, await ask(undivided, newId(), name));
});
afterAll(async () => {
  await Promise.all([producer, consumer, undivided].map((worker) => worker?.program.stop('SIGKILL')));
});

const newId = () => {
  const [prefill, decode] = [producer, consumer].map(({ kvAddress }) => parseHostPort(kvAddress));
  return proxyRequestId(prefill!, decode!, randomBytes(16).toString('hex'));
};
/** `before`: makes the prompt another from its first block on. */
async function ask({ url }: WorkerHandle, id: string, before: string, max_tokens = 6): Promise<string> {
  const response = await fetch(`${url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'x-request-id': id },
    body: JSON.stringify({ model: 'demo', prompt: `${before}: ${PROMPT}`, max_tokens, temperature: 0 }),
  });
  const { choices } = (await response.json()) as { choices: { text: string }[] };
  return choices[0]!.text;
}
const metric = async (worker: WorkerHandle, name: string) =>
  (await metricsOf(worker)).get(name) ?? Number.NaN;
/** The consumer is asked, and its producer never is: the WANT is heard there, and waits. */
async function wanting(before: string): Promise<{ readonly answer: Promise<string> }> {
  const answer = ask(consumer, newId(), before);
  await eventually('the WANT to be heard', 60_000, async () => {
    const { core } = (await (await fetch(`${producer.url}/debug/state`)).json()) as { core: CoreState };
    return (core.handOver?.grants.unbound ?? 0) > 0;
  });
  return { answer };
}

test('a producer that is stopped is given up; what it may still write to is nobody’s until it goes on', async () => {
  const id = newId();
  await ask(producer, id, 'first', 1);
  await ask(consumer, id, 'first');
  expect(await metric(consumer, 'pd_native_connections{transport="direct"}')).toBe(1);
  const { answer } = await wanting('second');
  producer.program.child.kill('SIGSTOP');
  expect(await answer).toBe(expected.get('second'));
  expect(await metric(consumer, 'pd_native_quarantined_blocks')).toBeGreaterThan(0);
  producer.program.child.kill('SIGCONT');
  await eventually('the end of the quarantine', 60_000, async () => {
    return (await metric(consumer, 'pd_native_quarantined_blocks')) === 0;
  });
  expect(await metric(consumer, 'pd_kv_blocks_used')).toBe(0);
});

test('a producer that is killed is known to be dead, and its blocks are free', async () => {
  const { answer } = await wanting('third');
  await producer.program.stop('SIGKILL');
  expect(await answer).toBe(expected.get('third'));
  await eventually('no block in use', 60_000, async () => {
    const [quarantined, used] = await Promise.all([
      metric(consumer, 'pd_native_quarantined_blocks'),
      metric(consumer, 'pd_kv_blocks_used'),
    ]);
    return quarantined === 0 && used === 0;
  });
});
