/** The whole system on two stand-in GPUs: the host computes, KV moves through GPU memory and NCCL's calls. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { inParallel } from '../../support/parallel.ts';
import { standInEnvironment } from '../stand-ins/build.ts';
import { metricsOf, startProxy, startWorker, untilListed, type WorkerHandle } from '../support/cluster.ts';
import { kvMovedProblems } from '../support/kv-moved.ts';
import { complete, mixedRequests } from '../support/requests.ts';

const ON_GPU = ['--executor', 'host', '--kv-load-failure', 'fail', '--kv-buffer-size', '64e6'];

describe('producer on cuda:0, consumer on cuda:1', () => {
  let undivided: WorkerHandle;
  beforeAll(async () => {
    Object.assign(process.env, standInEnvironment());
    undivided = await startWorker('both', undefined);
  });
  afterAll(() => undivided.program.stop());

  test.each(['PUT_ASYNC', 'PUT', 'GET'])(
    '%s: text equals the undivided worker, and KV moved',
    async (sendType) => {
      const proxy = await startProxy();
      const args = [...ON_GPU, '--send-type', sendType];
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
    },
  );

  test('a worker whose NCCL never lets go of a pair still ends when told, by itself', async () => {
    const proxy = await startProxy();
    const producer = await startWorker('producer', proxy, [...ON_GPU, '--device', 'cuda:0']);
    Object.assign(process.env, { PD_STANDIN_FAULTS: 'ncclCommAbort=hang' });
    const consumer = await startWorker('consumer', proxy, [...ON_GPU, '--device', 'cuda:1']);
    delete process.env['PD_STANDIN_FAULTS'];
    try {
      await untilListed(proxy, 1, 1);
      const [request] = mixedRequests(1, 3);
      expect((await complete(proxy.url, request!)).status).toBe(200);
      await producer.program.stop('SIGKILL'); // its pair has to be aborted now
      await consumer.program.stop('SIGTERM', 60_000);
      // By itself, or by the alarm that it set: never by the SIGKILL of a reader who lost patience.
      expect(consumer.program.child.signalCode).not.toBe('SIGKILL');
    } finally {
      await Promise.all([producer, consumer, proxy].map(({ program }) => program.stop('SIGKILL')));
    }
  });
});
