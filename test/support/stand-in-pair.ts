/** A pair on two stand-in GPUs, beside an undivided worker. */
import { expect } from 'vitest';
import { inParallel } from '../../bench/measure/parallel.ts';
import { metricsOf, startProxy, startWorker, untilListed, type WorkerHandle } from './cluster.ts';
import { kvMovedProblems } from './kv-moved.ts';
import { complete, mixedRequests } from './requests.ts';

export const ON_GPU = ['--executor', 'host', '--kv-load-failure', 'fail', '--kv-buffer-size', '64e6'];

/** Producer on cuda:0, consumer on cuda:1: text equals the undivided worker's, and KV moved. */
export async function expectStandInPair(
  sendType: 'PUT_ASYNC' | 'PUT' | 'GET',
  undivided: WorkerHandle,
): Promise<void> {
  const proxy = await startProxy();
  const args = [...ON_GPU, '--wire', 'frozen', '--send-type', sendType];
  const producer = await startWorker('producer', proxy, [...args, '--device', 'cuda:0']);
  const consumer = await startWorker('consumer', proxy, [...args, '--device', 'cuda:1']);
  try {
    await untilListed(proxy, 1, 1);
    const requests = mixedRequests(12, 11);
    const expected = await inParallel(requests, 8, (request) => complete(undivided.url, request));
    const before = [await metricsOf(consumer)];
    const answers = await inParallel(requests, 8, (request) => complete(proxy.url, request));
    const after = [await metricsOf(consumer)];
    expect(answers.map(({ error, text }) => error ?? text)).toEqual(expected.map(({ text }) => text));
    const promptTokens = answers.map((answer) => answer.promptTokens);
    expect(kvMovedProblems(before, after, promptTokens)).toEqual([]);
  } finally {
    await Promise.all([producer, consumer, proxy].map(({ program }) => program.stop()));
  }
}
