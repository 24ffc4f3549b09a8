/** A whole system on two stand-in GPUs; that it says what an undivided worker says is seen in cuda-stand-ins.test.ts. */
import { expect, test } from 'vitest';
import { standInEnvironment } from '../stand-ins/build.ts';
import { startProxy, startWorker, untilListed } from '../support/cluster.ts';
import { complete, mixedRequests } from '../support/requests.ts';
import { ON_GPU } from '../support/stand-in-pair.ts';

test('a worker whose NCCL never lets go of a pair still ends when told, by itself', async () => {
  Object.assign(process.env, standInEnvironment());
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
