/** Which addresses may talk to a port: `--allow-peers 10.0.0.0/8,fd00::/8,192.168.1.7`. Pure. */
import { isIP } from 'node:net';
import ipaddr from 'ipaddr.js';
import { PdError } from '../errors.ts';

interface Range {
  readonly address: ipaddr.IPv4 | ipaddr.IPv6;
  readonly bits: number;
  /** Of a link-local entry that names its interface; without one, any interface. */
  readonly zone: string | undefined;
}

export class AllowList {
  readonly #ranges: readonly Range[];
  readonly #text: string;

  private constructor(entries: readonly string[], ranges: readonly Range[]) {
    this.#ranges = ranges;
    this.#text = entries.join(', ');
  }

  /**
   * Addresses and CIDR ranges of both families; IPv6 entries may carry a zone id, IPv4 ones may be written as v4-mapped. A list without
   * entries allows nobody. Throws CONFIG_INVALID that names `what` and the entry.
   */
  static parse(entries: readonly string[], what = '--allow-peers'): AllowList {
    const trimmed = entries.map((entry) => entry.trim()).filter((entry) => entry !== '');
    return new AllowList(
      trimmed,
      trimmed.map((entry) => rangeOf(entry, what)),
    );
  }

  /** `address` as sockets tell it: a literal, perhaps v4-mapped, perhaps with a zone id. What is no address is not allowed. */
  allows(address: string): boolean {
    if (isIP(address) === 0) return false;
    // v4-mapped becomes the IPv4 address that it is
    const parsed = ipaddr.process(address);
    return this.#ranges.some(({ address: network, bits, zone }) => {
      if (network.kind() !== parsed.kind()) return false;
      if (zone !== undefined && zoneOf(parsed) !== zone) return false;
      return parsed.match(network, bits);
    });
  }

  toString(): string {
    return this.#text;
  }
}

/** An address as people write it: a v4-mapped one as the IPv4 address that it is. Other text stays as it is. */
export function plainAddress(address: string): string {
  return isIP(address) === 0 ? address : ipaddr.process(address).toString();
}

function rangeOf(entry: string, what: string): Range {
  const [literal = '', prefix, ...rest] = entry.split('/');
  const version = isIP(literal);
  const most = version === 6 ? 128 : 32;
  const bits = prefix === undefined ? most : /^\d{1,3}$/.test(prefix) ? Number(prefix) : Number.NaN;
  // isIP is asked first, because ipaddr.js also takes `10.1` and octal numbers.
  if (version === 0 || rest.length > 0 || !(bits <= most)) {
    throw new PdError(
      'CONFIG_INVALID',
      `${what}: ${JSON.stringify(entry)} is neither an IP address nor a range such as 10.0.0.0/8 or fd00::/8`,
    );
  }
  const address = ipaddr.parse(literal);
  if (address instanceof ipaddr.IPv6 && address.isIPv4MappedAddress() && bits >= 96) {
    return { address: address.toIPv4Address(), bits: bits - 96, zone: undefined };
  }
  return { address, bits, zone: zoneOf(address) };
}

function zoneOf(address: ipaddr.IPv4 | ipaddr.IPv6): string | undefined {
  return address instanceof ipaddr.IPv6 ? address.zoneId : undefined;
}
