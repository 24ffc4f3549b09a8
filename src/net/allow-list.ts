/** Which addresses may talk to a port: `--allow-peers 10.0.0.0/8,fd00::/8,192.168.1.7`. Pure. */
import { isIP } from 'node:net';
import ipaddr from 'ipaddr.js';
import { PdError } from '../errors.ts';

interface Range {
  readonly address: ipaddr.IPv4 | ipaddr.IPv6;
  readonly bits: number;
  /** The interface that a link-local entry names; undefined: any. */
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
   * Addresses and CIDR ranges of both families; IPv6 entries may carry a zone id, IPv4 ones may be written as v4-mapped. An empty list
   * allows nobody. Throws CONFIG_INVALID naming `what` and the entry.
   */
  static parse(entries: readonly string[], what = '--allow-peers'): AllowList {
    const trimmed = entries.map((entry) => entry.trim()).filter((entry) => entry !== '');
    return new AllowList(
      trimmed,
      trimmed.map((entry) => rangeOf(entry, what)),
    );
  }

  /** `address` as sockets report it: a literal, possibly v4-mapped, possibly with a zone id. Anything else is not allowed. */
  allows(address: string): boolean {
    if (isIP(address) === 0) return false;
    // turns v4-mapped into IPv4
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

/** An address as people write it: v4-mapped becomes IPv4. Any other text is returned unchanged. */
export function plainAddress(address: string): string {
  return isIP(address) === 0 ? address : ipaddr.process(address).toString();
}

function rangeOf(entry: string, what: string): Range {
  const [literal = '', prefix, ...rest] = entry.split('/');
  const version = isIP(literal);
  const most = version === 6 ? 128 : 32;
  const bits = prefix === undefined ? most : /^\d{1,3}$/.test(prefix) ? Number(prefix) : Number.NaN;
  // isIP comes first, because ipaddr.js also accepts `10.1` and octal numbers.
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
