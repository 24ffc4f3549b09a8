/** The whole system on two stand-in GPUs: the host computes, KV moves through GPU memory and NCCL's calls. */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { standInEnvironment } from '../stand-ins/build.ts';
import { startWorker, type WorkerHandle } from '../support/cluster.ts';
import { expectStandInPair } from '../support/stand-in-pair.ts';

describe('producer on cuda:0, consumer on cuda:1', () => {
  let undivided: WorkerHandle;
  beforeAll(async () => {
    Object.assign(process.env, standInEnvironment());
    undivided = await startWorker('both', undefined);
  });
  afterAll(() => undivided.program.stop());

  test.each(['PUT_ASYNC', 'PUT', 'GET'] as const)(
    '%s: text equals the undivided worker, and KV moved',
    async (sendType) => {
      expect.hasAssertions();
      await expectStandInPair(sendType, undivided);
    },
  );
});
