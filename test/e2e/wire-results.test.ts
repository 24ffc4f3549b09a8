/** The frozen wire beside the Python peer, on the host; by NCCL on stand-in GPUs in test/wide. */
import { expect, test } from 'vitest';
import { expectEveryByteRight, wireResultsPython } from '../support/wire-results.ts';

test.skipIf(wireResultsPython === undefined)(
  'wire-results.sh on host: every byte right in all ways of sending, families and restarts; the report says so',
  async () => {
    expect.hasAssertions();
    await expectEveryByteRight('host');
  },
);
