import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { AllowList } from '../../../src/net/allow-list.ts';

describe('allow list', () => {
  const cases: [entry: string, allowed: string[], refused: string[]][] = [
    [
      '10.0.0.0/8',
      ['10.0.0.0', '10.255.255.255', '::ffff:10.1.2.3'],
      ['11.0.0.0', '9.255.255.255', '::a00:1'],
    ],
    ['10.1.2.3/8', ['10.200.0.1'], ['11.0.0.1']],
    ['192.168.1.7', ['192.168.1.7', '::ffff:c0a8:107'], ['192.168.1.8']],
    ['::ffff:10.0.0.0/104', ['10.9.9.9', '::ffff:10.0.0.1'], ['11.0.0.1', '::1']],
    ['fd00::/8', ['fd00::1', 'fdff:1::', 'FD12::'], ['fe00::1', '10.0.0.1']],
    ['::1', ['::1', '0:0:0:0:0:0:0:1'], ['::2', '127.0.0.1']],
    ['fe80::/10', ['fe80::1', 'fe80::1%eth0', 'febf::%eth1'], ['fec0::1']],
    ['fe80::1%eth0', ['fe80::1%eth0'], ['fe80::1%eth1', 'fe80::1', 'fe80::2%eth0']],
    ['0.0.0.0/0', ['1.2.3.4', '::ffff:1.2.3.4'], ['::1']],
    ['::/0', ['::1', 'fe80::1%eth0'], ['1.2.3.4', '::ffff:1.2.3.4']],
  ];
  test.each(cases)('%s', (entry, allowed, refused) => {
    const list = AllowList.parse([entry]);
    expect(allowed.filter((address) => !list.allows(address))).toEqual([]);
    expect(refused.filter((address) => list.allows(address))).toEqual([]);
  });

  test('any of several entries will do; none allows nobody', () => {
    const list = AllowList.parse([' 10.0.0.0/8', 'fd00::/8 ', '']);
    expect(['10.1.1.1', 'fd00::5', '127.0.0.1'].map((address) => list.allows(address))).toEqual([
      true,
      true,
      false,
    ]);
    expect(String(list)).toBe('10.0.0.0/8, fd00::/8');
    expect(AllowList.parse([]).allows('127.0.0.1')).toBe(false);
  });

  test.each([
    '10.0.0.0/33',
    'fd00::/129',
    '10.0.0.0/',
    '10.0.0.0/8/8',
    '10.0.0.0/-1',
    '10.0.0.0/8.0',
    '10.1',
    '010.0.0.1',
    '0x7f.0.0.1',
    'localhost',
    '[::1]',
    '10.0.0.1:80',
    '*',
  ])('%s is refused by name', (entry) => {
    expect(() => AllowList.parse(['10.0.0.0/8', entry])).toThrow(
      expect.objectContaining({
        code: 'CONFIG_INVALID',
        message: expect.stringContaining(`--allow-peers: ${JSON.stringify(entry)}`) as string,
      }) as Error,
    );
  });

  test('property: an address is in its own ranges, and text that is no address is in none', () => {
    fc.assert(
      fc.property(fc.ipV4(), fc.ipV6(), fc.integer({ min: 0, max: 32 }), (v4, v6, bits) => {
        expect(AllowList.parse([`${v4}/${bits}`]).allows(v4)).toBe(true);
        expect(AllowList.parse([`${v6}/${bits * 4}`, v6]).allows(v6)).toBe(true);
      }),
    );
    const everyone = AllowList.parse(['0.0.0.0/0', '::/0']);
    for (const text of ['', 'x', '10.1', '10.0.0.1:80', '::1/128']) expect(everyone.allows(text)).toBe(false);
  });
});
