import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { startWorker, type WorkerHandle } from '../support/cluster.ts';
import { expectMixedLoad } from '../support/mixed-load.ts';

describe('mixed requests through two producers and two consumers', () => {
  let undivided: WorkerHandle;
  beforeAll(async () => {
    undivided = await startWorker('both', undefined);
  });
  afterAll(async () => {
    await undivided.program.stop();
  });

  test.each([
    ['PUT_ASYNC', 200, 'frozen'],
    ['PUT', 40, 'frozen'],
    ['GET', 40, 'frozen'],
    ['PUT_ASYNC', 200, 'auto'],
  ] as const)(
    '%s, %i requests, --wire %s: text equals the undivided worker, KV moved, nothing is left',
    async (sendType, count, wire) => {
      expect.hasAssertions();
      await expectMixedLoad(sendType, count, undivided, wire);
    },
  );
});
