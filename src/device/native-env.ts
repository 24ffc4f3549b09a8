/** The environment variables that native libraries read: decided only here, and set before any library loads. */
import { isIP, isIPv6 } from 'node:net';
import { type NetworkInterfaceInfo, networkInterfaces } from 'node:os';
import { type HostPort, isUnspecified } from '../net/address.ts';
import { plainAddress } from '../net/allow-list.ts';

type Interfaces = Readonly<Record<string, readonly NetworkInterfaceInfo[] | undefined>>;
/** The transfer options that decide it. */
export interface NativeConfig {
  readonly device: string;
  readonly bind: HostPort;
  readonly announceHost: string;
}

/** Lazy loading may wait for the device in the middle of a launch, and waits while any receive waits for its sender. */
export const CUDA_ENVIRONMENT: Readonly<Record<string, string>> = { CUDA_MODULE_LOADING: 'EAGER' };

/**
 * Sets what the user has not set; nothing for a worker on `host`. Call before anything else at start, on the main thread: `process.env` of
 * another thread is a copy that the C library never sees (there `setNativeDefaults` of ffi/libc.ts does it).
 */
export function prepareNativeEnvironment(
  config: NativeConfig,
  env: Record<string, string | undefined> = process.env,
  interfaces: Interfaces = networkInterfaces(),
): void {
  for (const [name, value] of Object.entries(nativeEnvironment(config, interfaces))) env[name] ??= value;
}

/** What a worker's native libraries should find in the environment. */
export function nativeEnvironment(
  { device, bind, announceHost }: NativeConfig,
  interfaces: Interfaces,
): Record<string, string> {
  if (!device.startsWith('cuda')) return {};
  return { ...CUDA_ENVIRONMENT, ...ncclEnvironment(bind.host, announceHost, interfaces) };
}

/** For a KV listener that is bound to `bound` and told to peers as `announced`. */
export function ncclEnvironment(
  bound: string,
  announced: string,
  interfaces: Interfaces = networkInterfaces(),
): Record<string, string> {
  const { name, family } = ncclSocket(plainAddress(bound), plainAddress(announced), interfaces);
  return {
    // Device memory that NCCL can share between processes of one host without copies.
    NCCL_CUMEM_ENABLE: '1',
    // `=`: the exact name, not a prefix.
    ...(name === undefined ? {} : { NCCL_SOCKET_IFNAME: `=${name}` }),
    ...(family === undefined ? {} : { NCCL_SOCKET_FAMILY: `AF_INET${family === 6 ? '6' : ''}` }),
  };
}

interface NcclSocket {
  /** Absent: NCCL takes the first interface that is up. */
  readonly name?: string;
  /** Absent: either. */
  readonly family?: 4 | 6;
}

/**
 * The interface and family of NCCL's bootstrap: it goes the way that KV is announced on. What is bound decides, since it is this machine's
 * own and names one network; for `0.0.0.0` and `::`, which name all, what peers are told does, where this machine has it. An address that
 * it has not (a translated one) tells the family at most.
 */
function ncclSocket(bound: string, announced: string, interfaces: Interfaces): NcclSocket {
  const every = isUnspecified(bound);
  const deciding = every ? announced : bound;
  // Peers of a listener on 0.0.0.0 come over IPv4, whatever they were told.
  if (bound === '0.0.0.0' && isIPv6(deciding)) return { family: 4 };
  const family = isIP(deciding);
  if (family === 0) return isIP(bound) === 4 ? { family: 4 } : {};
  const name = interfaceOf(deciding, interfaces);
  if (name === undefined) return { family: family === 6 ? 6 : 4 };
  // NCCL passes over ::1 wherever it looks for an address, and then opens no communicator at all. Who is bound to ::1 has its peers on
  // this machine, and they reach 127.0.0.1 on the same interface.
  if (plainAddress(deciding) === '::1') return hasIpv4(name, interfaces) ? { name, family: 4 } : {};
  return { name, family: family === 6 ? 6 : 4 };
}

/** Undefined for an address that this machine does not have. A zone id names the interface itself. */
function interfaceOf(address: string, interfaces: Interfaces): string | undefined {
  const [plain = '', zone] = address.split('%');
  const has = (name: string) => interfaces[name]?.some((entry) => entry.address === plain) ?? false;
  if (zone !== undefined) {
    const byNumber = (name: string) =>
      interfaces[name]?.some((entry) => entry.family === 'IPv6' && String(entry.scopeid) === zone) ?? false;
    return Object.keys(interfaces).find((name) => has(name) && (name === zone || byNumber(name)));
  }
  return Object.keys(interfaces).find(has);
}

function hasIpv4(name: string, interfaces: Interfaces): boolean {
  return interfaces[name]?.some(({ family }) => family === 'IPv4') ?? false;
}
