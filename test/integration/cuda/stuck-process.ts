/** Started by processes.test.ts: a process whose abort hangs, and which wants to end. */
import { setTimeout as sleep } from 'node:timers/promises';
import { killAfter } from '../../../ffi/libc.ts';
import { createCudaDevice } from '../../../src/device/cuda.ts';
import { createNcclTransport } from '../../../src/transport/nccl/transport.ts';
import { useStandIns } from '../../stand-ins/build.ts';

const standIns = useStandIns();
standIns.faults('ncclCommAbort=hang');

const device = await createCudaDevice(0);
const transport = await createNcclTransport(device, {
  bindHost: '127.0.0.1',
  announceHost: '127.0.0.1',
  ncclNumChannels: 8,
});
const opening = transport.open({
  uniqueId: transport.createUniqueId(),
  rank: 0,
  peer: 'nobody',
  timeoutMs: 10,
});
await opening.catch(() => {});
while (standIns.hanging() === 0) await sleep(10);
killAfter(1);
process.exit(0);
