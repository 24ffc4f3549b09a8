/** The frozen wire beside the Python peer: on the host, and by blocking NCCL as vLLM's on stand-in GPUs. */
import { describe, expect, test } from 'vitest';
import { expectEveryByteRight, runWireResults, wireResultsPython } from '../support/wire-results.ts';

describe.skipIf(wireResultsPython === undefined)('wire-results.sh on cuda', () => {
  test('every byte right in all ways of sending, families and restarts; the report says so', async () => {
    expect.hasAssertions();
    await expectEveryByteRight('cuda');
  });

  test('a pair that never opens ends in time, as failures that name the call', async () => {
    const { code, result } = await runWireResults('cuda', ['--patience', '4'], {
      PD_STANDIN_FAULTS: 'init=hang',
    });
    expect(code).toBe(1);
    expect(result.problems.join('\n')).toMatch(/ncclCommInitRank as rank 0 has not returned after/);
    expect(result.peer?.error).toMatch(/3 checks failed, so the rest was not tried/);
  });
});

test.skipIf(wireResultsPython === undefined)(
  'wire-results.sh on host: every byte right in all ways of sending, families and restarts; the report says so',
  async () => {
    expect.hasAssertions();
    await expectEveryByteRight('host');
  },
);
