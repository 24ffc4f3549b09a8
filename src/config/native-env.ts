/** The environment that native libraries read, set on the main thread before any of them loads: `getenv` sees no other thread's. */
import { isIPv6 } from 'node:net';
import { type NetworkInterfaceInfo, networkInterfaces } from 'node:os';
import type { WorkerConfig } from './worker-config.ts';

type Interfaces = Readonly<Record<string, readonly NetworkInterfaceInfo[] | undefined>>;
type NativeConfig = Pick<WorkerConfig, 'device' | 'kv'>;

/** Sets what the user has not set; nothing for a worker on `host`. Call before anything else at start. */
export function prepareNativeEnvironment(
  config: NativeConfig,
  env: Record<string, string | undefined> = process.env,
  interfaces: Interfaces = networkInterfaces(),
): void {
  for (const [name, value] of Object.entries(nativeEnvironment(config, interfaces))) env[name] ??= value;
}

/** What a worker's native libraries should find in the environment. */
export function nativeEnvironment(config: NativeConfig, interfaces: Interfaces): Record<string, string> {
  if (!config.device.startsWith('cuda')) return {};
  const host = config.kv.bind.host;
  const name = Object.entries(interfaces).find(([, addresses]) =>
    addresses?.some(({ address }) => address === host),
  )?.[0];
  return {
    // Device memory that NCCL can share between processes of one host without copies.
    NCCL_CUMEM_ENABLE: '1',
    // Lazy loading may wait for the device in the middle of a launch.
    CUDA_MODULE_LOADING: 'EAGER',
    // NCCL's bootstrap goes the way that KV goes. `=`: the exact name, not a prefix.
    ...(name === undefined ? {} : { NCCL_SOCKET_IFNAME: `=${name}` }),
    NCCL_SOCKET_FAMILY: isIPv6(host) ? 'AF_INET6' : 'AF_INET',
  };
}
