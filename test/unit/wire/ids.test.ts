import { isIPv6 } from 'node:net';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { formatHostPort } from '../../../src/net/address.ts';
import {
  engineRequestId,
  kvKeyOf,
  peerAddressOf,
  proxyRequestId,
  splitTensorId,
  suffixedFor,
  tensorIdOf,
  withoutSuffix,
} from '../../../src/wire/ids.ts';

const hexOf = (digits: number) =>
  fc.string({ unit: fc.constantFrom(...'0123456789abcdef'), minLength: digits, maxLength: digits });
const suffix = hexOf(8);
const uuid = hexOf(32);
const host = fc.oneof(fc.ipV4(), fc.ipV6().filter(isIPv6), fc.domain());
const address = fc.record({ host, port: fc.integer({ min: 1, max: 65_535 }) });
const headerId = fc.tuple(address, address, uuid).map(([p, d, id]) => proxyRequestId(p, d, id));
/** What servers make of a header: completions with the index of the prompt, chat without. */
const serverId = fc.oneof(
  fc.tuple(headerId, fc.nat(5000)).map(([id, index]) => `cmpl-${id}-${index}`),
  headerId.map((id) => `chatcmpl-${id}`),
);

describe('suffixes of frozen engines', () => {
  test('property: what a proxy has made is found behind one suffix, and is never taken for one itself', () => {
    fc.assert(
      fc.property(serverId, suffix, (id, random) => {
        expect(suffixedFor(engineRequestId(id, random), 'proxy')).toBe(id);
        expect(suffixedFor(engineRequestId(id, random), 'none')).toBeUndefined();
        expect(suffixedFor(id, 'proxy')).toBeUndefined();
      }),
    );
  });

  test('property: of ids that nobody but a client has made, a suffix is looked for only where it is asked for', () => {
    const ids = fc.oneof(fc.string(), fc.uuid(), hexOf(32), fc.constantFrom('order', 'cmpl-x-0', '-'));
    fc.assert(
      fc.property(ids, suffix, (id, random) => {
        expect(suffixedFor(`${id}-${random}`, 'proxy')).toBeUndefined();
        expect(suffixedFor(`${id}-${random}`, 'any')).toBe(id === '' ? undefined : id);
      }),
    );
  });

  test('property: two prompts of one request are never taken for one another', () => {
    fc.assert(
      fc.property(headerId, fc.nat(5000), fc.nat(5000), suffix, (id, a, b, random) => {
        const [sent, wanted] = [a, b].map((index) => `cmpl-${id}-${index}`);
        expect(suffixedFor(`${sent}-${random}`, 'proxy') === wanted).toBe(a === b);
      }),
    );
  });

  const uuid32 = '0123456789abcdef0123456789abcdef';
  const header = `___prefill_addr_h:1___decode_addr_h:2_${uuid32}`;
  test.each([
    [`cmpl-${header}-0-89abcdef`, `cmpl-${header}-0`],
    [`chatcmpl-${header}-89abcdef`, `chatcmpl-${header}`],
    [`cmpl-${header}-89abcdef`, undefined], // no prompt index: it is that
    [`cmpl-${header}-12345678`, undefined], // a prompt index, however long
    [`chatcmpl-${header}-0-89abcdef`, undefined],
    [`cmpl-${header}-0-89abcdef-89abcdef`, undefined], // once
    [`cmpl-${header}-0-89ABCDEF`, undefined],
    [`cmpl-${header}-0-89abcde`, undefined],
    [`cmpl-${header.slice(0, -1)}-0-89abcdef`, undefined],
    [`cmpl-___prefill_addr_h:1_${uuid32}-0-89abcdef`, undefined],
    [`x-${header}-0-89abcdef`, undefined],
    ['order-20261128', undefined],
  ])('%s means %s', (foreign, meant) => {
    expect(suffixedFor(foreign, 'proxy')).toBe(meant);
  });

  test.each([
    ['a-00000000-11111111', 'a-00000000'], // once
    ['-89abcdef', undefined], // nothing in front
    ['89abcdef', undefined],
    ['x-89ABCDEF', undefined],
    ['x-89abcdef0', undefined],
    ['x_89abcdef', undefined],
    ['', undefined],
  ])('%j without a suffix is %j', (id, stem) => {
    expect(withoutSuffix(id)).toBe(stem);
  });

  test('KV is known by the id of the server, or as in vLLM by that of the engine', () => {
    const ids = { serverId: 'order-20261128', requestId: engineRequestId('order-20261128', 'deadbeef') };
    expect(kvKeyOf(ids, 'transfer')).toBe('order-20261128');
    expect(kvKeyOf(ids, 'engine')).toBe('order-20261128-deadbeef');
  });
});

describe('peers in request ids', () => {
  test('property: both addresses come back, from the header, the server id and the engine id, IPv6 too', () => {
    fc.assert(
      fc.property(address, address, uuid, fc.nat(99), suffix, (prefill, decode, id, index, random) => {
        const header = proxyRequestId(prefill, decode, id);
        for (const text of [header, `cmpl-${header}-${index}`, `chatcmpl-${header}-${random}`]) {
          expect(peerAddressOf(text, 'prefill')).toEqual(prefill);
          expect(peerAddressOf(text, 'decode')).toEqual(decode);
        }
      }),
    );
  });

  test('the id is in the form that vLLM reads', () => {
    const prefill = { host: '10.0.0.1', port: 8082 };
    const decode = { host: '::1', port: 8084 };
    const id = proxyRequestId(prefill, decode, '0'.repeat(32));
    expect(id).toBe(`___prefill_addr_10.0.0.1:8082___decode_addr_[::1]:8084_${'0'.repeat(32)}`);
    expect(/___decode_addr_(.*):(\d+)/.exec(id)?.slice(1)).toEqual(['[::1]', '8084']);
    expect(/___prefill_addr_(.*):(\d+)___/.exec(id)?.slice(1)).toEqual(['10.0.0.1', '8082']);
    expect(formatHostPort(decode)).toBe('[::1]:8084');
  });

  test.each([
    '',
    'cmpl-1',
    '___decode_addr_:1',
    '___decode_addr_a;b:1_',
    '___decode_addr_*:1_',
    '___decode_addr_h:99999_',
  ])('%j names no peer', (id) => {
    expect(peerAddressOf(id, 'decode')).toBeUndefined();
    expect(peerAddressOf(id, 'prefill')).toBeUndefined();
  });
});

describe('tensor ids', () => {
  test('property: both halves come back, whatever the request id holds', () => {
    const layer = fc.string({ minLength: 1 }).filter((name) => !name.includes('#'));
    fc.assert(
      fc.property(fc.string(), layer, (id, layerName) => {
        expect(splitTensorId(tensorIdOf(engineRequestId(id), layerName))).toEqual({
          requestId: id,
          layerName,
        });
      }),
    );
    expect(splitTensorId('nothing')).toEqual({ requestId: 'nothing', layerName: '' });
  });
});
