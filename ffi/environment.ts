/** Variables that CUDA and NCCL read once per process. Ours are defaults: what the user has set stays. */
import { isIP } from 'node:net';
import { networkInterfaces } from 'node:os';
import { setNativeDefault } from './libc.ts';

/** Before libcuda loads: modules load at once, since a lazy load waits while any receive waits for its sender. */
export function prepareCudaEnvironment(): void {
  setNativeDefault('CUDA_MODULE_LOADING', 'EAGER');
}

/**
 * Before libnccl loads. `kvHost`, the address told to peers, decides over which interface NCCL's bootstrap goes; without this NCCL
 * takes the first interface that is up, which need not reach the peer.
 */
export function prepareNcclEnvironment(kvHost: string): void {
  setNativeDefault('NCCL_CUMEM_ENABLE', '1');
  const address = kvHost.replace(/%.*$/, '');
  const name = interfaceOf(address);
  // `=` asks for exactly this name; otherwise it is a prefix
  if (name !== undefined) setNativeDefault('NCCL_SOCKET_IFNAME', `=${name}`);
  const family = isIP(address);
  if (family !== 0) setNativeDefault('NCCL_SOCKET_FAMILY', family === 6 ? 'AF_INET6' : 'AF_INET');
}

/** The interface that has an address; undefined for a host name or an address that is not of this machine. */
export function interfaceOf(address: string): string | undefined {
  for (const [name, addresses] of Object.entries(networkInterfaces())) {
    if (addresses?.some((entry) => entry.address === address)) return name;
  }
  return undefined;
}
