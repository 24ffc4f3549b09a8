/** What the self-test of a path says of what it measured. */
import { afterEach, beforeEach, expect, it, vi } from 'vitest';
import type { CudaDevice } from '../../../../src/device/cuda/device.ts';
import type { EventPoller } from '../../../../src/device/poller.ts';
import type { Logger } from '../../../../src/observability/log.ts';
import { SelfTests, type TestedPath } from '../../../../src/transfer/native/self-test.ts';

const MIB = 2 ** 20;
const BUS = '0000:00:01.0';

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

/** Within one H200: each large write takes so many nanoseconds of its clock. */
function measure(bytes: number, nanoseconds: number) {
  const said: string[] = [];
  let writes = 0;
  const log = {
    info: (_: object, text: string) => said.push(`info ${text}`),
    warn: (_: object, text: string) => said.push(`warn ${text}`),
  };
  const tested = {
    peer: 'consumer',
    claims: { scratch: { offset: 0, bytes }, gpu: { busId: BUS, name: 'NVIDIA H200' } },
    writer: {
      probe: (atMost: number) => {
        if (atMost === bytes) writes++;
        return atMost === bytes ? bytes : 4_096;
      },
    },
    page: { probeNanoseconds: BigInt(nanoseconds) },
  } as unknown as TestedPath;
  const tests = new SelfTests({
    device: { runtime: { pciBusId: () => BUS, deviceCount: () => 1 }, index: 0 } as unknown as CudaDevice,
    poller: { drained: async () => {} } as unknown as EventPoller,
    log: log as unknown as Logger,
    idle: () => true,
    onChange: () => {},
  });
  tests.add(tested);
  return { tests, tested, said, writes: () => writes };
}

it('takes no short write for a slow path: 4 MiB within one GPU, as measured', async () => {
  const { tests, tested, said, writes } = measure(4 * MIB, 5_984);
  await vi.advanceTimersByTimeAsync(250);
  expect(said).toEqual([
    expect.stringMatching(/^info .*: 700\.9 GB\/s over same GPU, which should give about 686 GB\/s, /),
  ]);
  expect(writes()).toBe(3);
  expect(tests.stateOf(tested)).toMatchObject({ state: 'measured', link: 'same GPU' });
});

it('warns of a path below half of what it should give, once it has been tried again', async () => {
  const { said, writes } = measure(4 * MIB, 13_000);
  await vi.advanceTimersByTimeAsync(500);
  expect(said).toEqual([]);
  await vi.advanceTimersByTimeAsync(250);
  expect(said).toEqual([expect.stringMatching(/^warn .*322\.6 GB\/s .*: less than half\./)]);
  expect(writes()).toBe(9);
  expect(vi.getTimerCount()).toBe(0);
});
