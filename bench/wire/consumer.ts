/** Our consumer in its own process: `consumer DEVICE PORT PATIENCE`, the last in seconds. The process channel says what to wait for. */
import { createDevice } from '../../src/device/create-device.ts';
import { hostMemory, hostView } from '../../src/device/memory.ts';
import type { HostPort } from '../../src/net/address.ts';
import { TransferEngine } from '../../src/transfer/engine.ts';
import type { TensorId } from '../../src/wire/ids.ts';
import { sha256 } from '../../support/python-peer.ts';
import { engineOptions } from './rig.ts';

/** The first message has its address; each further one answers a request. */
export interface ConsumerMessage {
  readonly address?: HostPort;
  readonly sha256?: string;
  readonly error?: string;
}

export interface ConsumerRequest {
  readonly tensorId: TensorId;
  readonly peer: HostPort;
}

const [deviceName = 'host', port = '0', patience = '15'] = process.argv.slice(2);

const tell = (message: ConsumerMessage) => process.send?.(message);
// Nobody is left to serve once the parent is gone.
process.once('disconnect', () => process.kill(process.pid, 'SIGKILL'));

const device = await createDevice(deviceName);
const stream = device.createStream();
const options = engineOptions(deviceName, Number(port), { patienceS: Number(patience) });
const engine = await TransferEngine.create({ ...options, sendType: 'PUT' });
process.on('message', ({ tensorId, peer }: ConsumerRequest) => {
  engine.receive(tensorId, peer).then(
    ({ memory }) => {
      const host = hostMemory(memory.bytes);
      device.copy(host, memory, stream);
      tell({ sha256: sha256(hostView(host)) });
    },
    (error: Error) => tell({ error: error.message }),
  );
});
tell({ address: engine.address });
