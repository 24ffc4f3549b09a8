import type { Device } from '../device/device.ts';
import { PdError } from '../errors.ts';
import type { Guard } from './host/acceptor.ts';
import { HostTransport } from './host/transport.ts';
import type { Transport } from './transport.ts';

export interface CreateTransportOptions {
  /** Host transport: where data connections are taken. */
  readonly bindHost: string;
  /** Host transport: the host that peers connect to. */
  readonly announceHost: string;
  /** Host transport: who may connect. NCCL's own connections are not seen here. */
  readonly guard?: Guard;
  /** NCCL: channels per communicator. */
  readonly ncclNumChannels: number;
}

/** The transport that reaches the memory of `device`. */
export async function createTransport(device: Device, options: CreateTransportOptions): Promise<Transport> {
  switch (device.kind) {
    case 'host':
      return HostTransport.create(options);
    case 'cuda': {
      const { createNcclTransport } = await import('./nccl/transport.ts').catch((cause: unknown) => {
        throw PdError.from(cause, 'DEVICE_UNAVAILABLE', { device: device.name });
      });
      return createNcclTransport(device, options);
    }
  }
}
