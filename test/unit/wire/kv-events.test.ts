import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { PdError } from '../../../src/errors.ts';
import {
  type BlockKey,
  blockKey,
  decodeKvEvents,
  decodeSequence,
  decodeSnapshot,
  encodeKvEvents,
  encodeSequence,
  encodeSnapshot,
  type KvEvent,
  type KvEventBatch,
  kvTopic,
} from '../../../src/wire/kv-events.ts';
import { KV_EVENTS } from './kv-events-golden.ts';

const bytes = (hex: string) => new Uint8Array(Buffer.from(hex, 'hex'));
const hex = (data: Uint8Array) => Buffer.from(data).toString('hex');
const key = (digits: string): BlockKey => blockKey(bytes(digits));
const [A, B, C] = [key('0123456789abcdef'), key('fedcba9876543210'), key('8000000000000000')];

const BATCH: KvEventBatch = {
  time: 1764331200.25,
  events: [
    { type: 'stored', keys: [A, B], tokens: [126, 127, 128, 129, 70_000, 1, 2, 3], blockSize: 4 },
    { type: 'stored', keys: [C], parent: B, tokens: [9, 8, 7, 6], blockSize: 4 },
    { type: 'removed', keys: [A] },
    { type: 'cleared' },
  ],
};

describe('batches', () => {
  test.each(['map', 'positional'] as const)("in vLLM's %s form, to the byte, and back", (form) => {
    expect(hex(encodeKvEvents(BATCH, form, 'GPU'))).toBe(KV_EVENTS[form]);
    expect(decodeKvEvents(bytes(KV_EVENTS[form]))).toEqual(BATCH);
  });

  test('of vLLM itself, with all it says besides', () => {
    expect(decodeKvEvents(bytes(KV_EVENTS['vllm 0.26']))).toEqual({ ...BATCH, events: [BATCH.events[0]] });
  });

  test('a whole hash is known by its end, and what we do not know is passed over', () => {
    expect(decodeKvEvents(bytes(KV_EVENTS['whole hashes'])).events).toEqual([
      { type: 'stored', keys: [A], parent: B, tokens: [1, 2, 3, 4], blockSize: 4 },
    ]);
  });

  const anyKey = fc.uint8Array({ minLength: 8, maxLength: 8 }).map(blockKey);
  const anyEvent: fc.Arbitrary<KvEvent> = fc.oneof(
    fc.record(
      {
        type: fc.constant('stored' as const),
        keys: fc.array(anyKey),
        parent: anyKey,
        tokens: fc.array(fc.nat()),
        blockSize: fc.integer({ min: 1, max: 1_024 }),
      },
      { requiredKeys: ['type', 'keys', 'tokens', 'blockSize'] },
    ),
    fc.record({ type: fc.constant('removed' as const), keys: fc.array(anyKey) }),
    fc.record({ type: fc.constant('cleared' as const) }),
  );

  test('come back equal, whatever they say', () => {
    fc.assert(
      fc.property(fc.array(anyEvent), fc.constantFrom('map', 'positional'), (events, form) => {
        const batch = { time: 12.5, events };
        expect(decodeKvEvents(encodeKvEvents(batch, form, 'CPU'))).toEqual(batch);
      }),
    );
  });

  test('with any bytes changed, they are read or refused, and nothing else', () => {
    const change = fc.record({ at: fc.nat(), to: fc.nat(255) });
    const source = fc.constantFrom(...Object.values(KV_EVENTS));
    fc.assert(
      fc.property(
        source,
        fc.array(change, { minLength: 1, maxLength: 4 }),
        fc.nat(),
        (whole, changes, cut) => {
          const body = bytes(whole);
          for (const { at, to } of changes) body[at % body.length] = to;
          for (const one of [body, body.subarray(0, cut % body.length)]) {
            for (const read of [() => decodeKvEvents(one), () => decodeSnapshot(one, new Uint8Array(16))]) {
              try {
                read();
              } catch (error) {
                expect(error).toBeInstanceOf(PdError);
              }
            }
          }
        },
      ),
      { numRuns: 1_000 },
    );
  });

  test('what is refused is shown, integers beyond 2^53 within it too', () => {
    // [time, [["BlockRemoved", [[2^64 - 1]]]]]
    const nested = bytes('92cb00000000000000009192ac426c6f636b52656d6f7665649191cfffffffffffffffff');
    expect(() => decodeKvEvents(nested)).toThrow(/hash is \["18446744073709551615"\]/);
  });

  test('a bomb is refused before it is decoded', () => {
    const claims = Buffer.from('92cb0000000000000000dd7fffffff', 'hex');
    expect(() => decodeKvEvents(claims)).toThrow(/array of 2147483647/);
    expect(() => decodeKvEvents(new Uint8Array(3 * 2 ** 20))).toThrow(/3145728 bytes/);
  });
});

test('the topic is what llm-d reads, sequences are big-endian, and -1 ends a replay', () => {
  expect(kvTopic('10.0.0.1:8081', 'org/model')).toBe('kv@10.0.0.1:8081@org/model');
  expect(hex(encodeSequence(258))).toBe('0000000000000102');
  expect(hex(encodeSequence(-1))).toBe('ffffffffffffffff');
  expect(decodeSequence(bytes('ffffffffffffffff'))).toBe(-1);
  for (const wrong of ['', '00', '7fffffffffffffff']) {
    expect(() => decodeSequence(bytes(wrong))).toThrow(PdError);
  }
});

test('a snapshot says all that is cached, as of a sequence', () => {
  const snapshot = { sequence: 41, blockSize: 4, keys: [A, C] };
  const [header, keys] = encodeSnapshot(snapshot);
  expect([hex(header), hex(keys)]).toEqual([KV_EVENTS.snapshot, '0123456789abcdef8000000000000000']);
  expect(decodeSnapshot(header, keys)).toEqual(snapshot);
  expect(() => decodeSnapshot(header, keys.subarray(1))).toThrow(/15 bytes for 2 keys/);
});
