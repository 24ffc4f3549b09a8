import { isIPv6 } from 'node:net';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  asDestination,
  formatHostPort,
  isUnspecified,
  parseHostPort,
  zmqEndpoint,
} from '../../../src/net/address.ts';
import { announceHost, hostAddress, localAddress } from '../../../src/net/local.ts';

const port = fc.integer({ min: 0, max: 65_535 });
const host = fc.oneof(fc.ipV4(), fc.ipV6().filter(isIPv6), fc.domain());

describe('host:port', () => {
  test('property: what is formatted is read back', () => {
    fc.assert(
      fc.property(host, port, (host, port) => {
        expect(parseHostPort(formatHostPort({ host, port }))).toEqual({ host, port });
      }),
    );
  });

  test('property: any text is an address or ADDRESS_INVALID', () => {
    fc.assert(
      fc.property(fc.oneof(fc.string(), fc.string({ unit: fc.constantFrom(...'[]:.%0159af*;') })), (text) => {
        try {
          const address = parseHostPort(text);
          expect(parseHostPort(formatHostPort(address))).toEqual(address);
        } catch (error) {
          expect(error).toMatchObject({ code: 'ADDRESS_INVALID' });
        }
      }),
      { numRuns: 1_000 },
    );
  });

  test('IPv6 stands in brackets, with its zone', () => {
    expect(parseHostPort('[fe80::1%eth0]:8082')).toEqual({ host: 'fe80::1%eth0', port: 8082 });
    expect(zmqEndpoint({ host: '::1', port: 14579 })).toBe('tcp://[::1]:14579');
    expect(zmqEndpoint({ host: 'node-1.local', port: 1 })).toBe('tcp://node-1.local:1');
  });

  test.each([
    '',
    ':80',
    'host',
    'host:',
    'host:x',
    'host:65536',
    '::1:80',
    '[::1]',
    '[host]:80',
    '[::1]:',
    'a b:80',
    '*:80',
    'eth0;10.0.0.1:80',
    'http://a:80',
  ])('%j is none, and the error names what was read', (text) => {
    expect(() => parseHostPort(text, '--proxy')).toThrow(/--proxy.*HOST:PORT/);
  });

  test('every interface, as a destination, is this machine', () => {
    expect(asDestination({ host: '0.0.0.0', port: 1 })).toEqual({ host: '127.0.0.1', port: 1 });
    expect(asDestination({ host: '::', port: 1 })).toEqual({ host: '::1', port: 1 });
    expect(asDestination({ host: '0:0:0:0:0:0:0:0', port: 1 }).host).toBe('::1');
    expect(asDestination({ host: '10.0.0.1', port: 1 }).host).toBe('10.0.0.1');
    expect(['::1', '10.0.0.0', 'host', ''].filter(isUnspecified)).toEqual([]);
  });
});

describe('the address told to others', () => {
  const entry = (address: string, internal = false) => {
    const common = { address, netmask: '', mac: '', internal, cidr: null };
    return isIPv6(address)
      ? { ...common, family: 'IPv6' as const, scopeid: 0 }
      : { ...common, family: 'IPv4' as const };
  };
  const interfaces = {
    lo: [entry('127.0.0.1', true), entry('::1', true)],
    eth0: [entry('fe80::1'), entry('10.0.0.7'), entry('fd00::7')],
  };

  test('an interface of the family that was bound, not loopback and not link-local', () => {
    expect(announceHost('0.0.0.0', { env: {}, interfaces })).toBe('10.0.0.7');
    expect(announceHost('::', { env: {}, interfaces })).toBe('fd00::7');
  });

  test('loopback where there is nothing else', () => {
    expect(localAddress(4, { env: {}, interfaces: { lo: interfaces.lo } })).toBe('127.0.0.1');
    expect(localAddress(6, { env: {}, interfaces: {} })).toBe('::1');
  });

  test('a host that was bound by itself is told as it is', () => {
    expect(announceHost('10.1.1.1', { env: {}, interfaces })).toBe('10.1.1.1');
    expect(announceHost('node-1', { env: {}, interfaces })).toBe('node-1');
  });

  test('PD_HOST_IP wins, and must be an address', () => {
    expect(announceHost('::', { env: { PD_HOST_IP: '192.0.2.1' }, interfaces })).toBe('192.0.2.1');
    expect(announceHost('10.1.1.1', { env: { PD_HOST_IP: 'fd00::9' }, interfaces })).toBe('fd00::9');
    expect(() => localAddress(4, { env: { PD_HOST_IP: 'node' } })).toThrow(/PD_HOST_IP "node"/);
  });

  test('names are resolved; one that is unknown is an error that names it', async () => {
    expect(['127.0.0.1', '::1']).toContain(await hostAddress('localhost'));
    expect(await hostAddress('fd00::1')).toBe('fd00::1');
    await expect(hostAddress('does-not-exist.invalid')).rejects.toMatchObject({ code: 'ADDRESS_INVALID' });
  });
});
