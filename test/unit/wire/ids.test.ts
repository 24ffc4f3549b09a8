import { isIPv6 } from 'node:net';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { formatHostPort } from '../../../src/net/address.ts';
import {
  engineRequestId,
  peerAddressOf,
  proxyRequestId,
  splitTensorId,
  tensorIdOf,
  transferIdOf,
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

describe('transfer ids', () => {
  test('property: the random suffixes of two engines give one transfer id; the index stays', () => {
    fc.assert(
      fc.property(serverId, suffix, suffix, (id, a, b) => {
        expect(transferIdOf(engineRequestId(id, a))).toBe(id);
        expect(transferIdOf(engineRequestId(id, b))).toBe(id);
        expect(transferIdOf(engineRequestId(id))).toBe(id);
      }),
    );
  });

  test('property: two prompts of one request never share a transfer id', () => {
    fc.assert(
      fc.property(headerId, fc.nat(5000), fc.nat(5000), suffix, (id, a, b, random) => {
        const ids = [a, b].map((index) => transferIdOf(engineRequestId(`cmpl-${id}-${index}`, random)));
        expect(ids[0] === ids[1]).toBe(a === b);
      }),
    );
  });

  test.each([
    ['cmpl-x-0-89abcdef', 'cmpl-x-0'],
    ['cmpl-x-0', 'cmpl-x-0'],
    ['chatcmpl-x-89abcdef', 'chatcmpl-x'],
    ['a-00000000-11111111', 'a-00000000'], // once
    ['-89abcdef', '-89abcdef'], // nothing in front
    ['89abcdef', '89abcdef'],
    ['x-89ABCDEF', 'x-89ABCDEF'], // no suffix of an engine
    ['x-89abcde', 'x-89abcde'],
    ['x-89abcdef0', 'x-89abcdef0'],
    ['x_89abcdef', 'x_89abcdef'],
    ['', ''],
  ])('%j -> %j', (engine, transfer) => {
    expect(transferIdOf(engine)).toBe(transfer);
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
