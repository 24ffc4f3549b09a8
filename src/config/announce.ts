/** Which host to tell others, given what is bound: what is bound need not be reachable under that name (0.0.0.0, containers). */
import { isIPv6 } from 'node:net';
import { isUnspecified } from '../net/address.ts';

export interface HostNames {
  /** `PD_HOST_IP`: what others are to use for this machine, above anything found here. */
  readonly hostIp?: string | undefined;
  /** An address of this machine, of the family if it has one. */
  readonly localAddress: (family: 4 | 6) => string;
}

/** `bound` absent: nothing is bound yet, any address of this machine. `::` listens on both families; IPv6 is told where there is one. */
export function announcedHost(names: HostNames, bound?: string): string {
  if (names.hostIp !== undefined && names.hostIp !== '') return names.hostIp;
  if (bound !== undefined && !isUnspecified(bound)) return bound;
  return names.localAddress(bound !== undefined && isIPv6(bound) ? 6 : 4);
}
