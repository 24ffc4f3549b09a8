/** All ways of sending, and many more requests, in test/wide. */
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

  test('natively: text equals the undivided worker, KV moved, nothing is left', async () => {
    expect.hasAssertions();
    await expectMixedLoad('PUT_ASYNC', 40, undivided, 'auto');
  });
});
