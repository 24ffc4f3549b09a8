/**
 * The whole system on two stand-in GPUs: the host computes, KV moves through GPU memory and NCCL's calls. PUT_ASYNC and GET so in test/wide,
 * and with the GPUs computing in cuda-executor.test.ts.
 */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { standInEnvironment } from '../stand-ins/build.ts';
import { startProxy, startWorker, untilListed, type WorkerHandle } from '../support/cluster.ts';
import { complete, mixedRequests } from '../support/requests.ts';
import { expectStandInPair, ON_GPU } from '../support/stand-in-pair.ts';

describe('producer on cuda:0, consumer on cuda:1', () => {
  let undivided: WorkerHandle;
  beforeAll(async () => {
    Object.assign(process.env, standInEnvironment());
    undivided = await startWorker('both', undefined);
  });
  afterAll(() => undivided.program.stop());

  test('PUT: text equals the undivided worker, and KV moved', async () => {
    expect.hasAssertions();
    await expectStandInPair('PUT', undivided);
  });

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
