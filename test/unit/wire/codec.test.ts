import { encode } from '@msgpack/msgpack';
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { PdError } from '../../../src/errors.ts';
import {
  decodeAnswer,
  decodeMessage,
  decodePing,
  encodeAnswer,
  encodeMessage,
  encodePing,
} from '../../../src/wire/codec.ts';
import { DTYPE_BYTES, type Dtype } from '../../../src/wire/dtype.ts';
import type { TensorId } from '../../../src/wire/ids.ts';
import { protocolErrorKind } from '../../../src/wire/limits.ts';
import type { Answer, PeerHello, PingMessage, UniqueId, WireMessage } from '../../../src/wire/messages.ts';
import { GOLDEN } from './golden.ts';

const limits = { maxTensorBytes: 2 ** 32 };
const huge = { maxTensorBytes: Number.MAX_SAFE_INTEGER };
const uniqueId = Uint8Array.from({ length: 128 }, (_, i) => i) as UniqueId;
const tensor_id = 'cmpl-x-0#model.layers.0.self_attn.attn' as TensorId;
const longId =
  'cmpl-___prefill_addr_10.0.0.1:8082___decode_addr_10.0.0.2:8084_0123456789abcdef0123456789abcdef-0-89abcdef#model.layers.31.self_attn.attn' as TensorId;
const promptDigest = '0123456789abcdef0123456789abcdef';
const hello: PeerHello = {
  version: 1,
  features: ['seq'],
  sendType: 'PUT_ASYNC',
  fingerprint: {
    digest: 'd1',
    model: 'demo',
    weights: 'w1',
    dtype: 'float32',
    blockSize: 16,
    layers: 4,
    heads: 2,
    headDim: 64,
  },
};
const put = { cmd: 'PUT', tensor_id, shape: [2, 3, 16, 8, 128], dtype: 'bfloat16' } as const;
const ret0 = { kind: 'get', ret: 0, shape: [4, 65535, 64], dtype: 'float16' } as const;
const refused = { code: 'SEND_TYPE_MISMATCH', message: 'GET here, PUT there' } as const;

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const bytes = (text: string) => Uint8Array.from(Buffer.from(text, 'hex'));

describe('bytes on the wire are those of python-msgpack', () => {
  const messages: Record<string, WireMessage> = {
    NEW: { cmd: 'NEW', unique_id: uniqueId },
    'NEW native': { cmd: 'NEW', unique_id: uniqueId, native: hello },
    PUT: put,
    'PUT long': { cmd: 'PUT', tensor_id: longId, shape: [2, 70000, 1, 1, 1000], dtype: 'uint8' },
    'PUT native': { ...put, native: {} },
    'PUT native, of a prompt': { ...put, native: { promptDigest } },
    GET: { cmd: 'GET', tensor_id },
  };
  test.each(Object.entries(messages))('%s', (name, message) => {
    const golden = GOLDEN[name as keyof typeof GOLDEN];
    expect(hex(encodeMessage(message))).toBe(golden);
    expect(decodeMessage(bytes(golden), limits)).toEqual(message);
  });

  const answers: Record<string, Answer> = {
    ret0,
    'ret0 native, of a prompt': { ...ret0, promptDigest },
    ret1: { kind: 'get', ret: 1 },
    'ret1 gone': { kind: 'get', ret: 1, gone: true },
    'ret1 near': { kind: 'get', ret: 1, near: ['a-0-01234567#l'] },
    hello: { kind: 'hello', hello },
    'hello refused': { kind: 'hello', hello: { version: 1, features: [], sendType: 'GET' }, refused },
  };
  test.each(Object.entries(answers))('answer %s', (name, answer) => {
    const golden = GOLDEN[name as keyof typeof GOLDEN];
    expect(hex(encodeAnswer(answer))).toBe(golden);
    expect(decodeAnswer(bytes(golden), limits)).toEqual(answer);
  });

  test.each([
    ['send', '0'],
    ['no-room', '1'],
    ['no-pair', '2'],
  ] as const)('answer %s is the raw character %s', (kind, character) => {
    expect(Buffer.from(encodeAnswer({ kind })).toString()).toBe(character);
    expect(decodeAnswer(Buffer.from(character), limits)).toEqual({ kind });
  });

  test('ping', () => {
    const ping: PingMessage = {
      type: 'P',
      http_address: '10.0.0.1:8081',
      zmq_address: '[fd00::1]:8082',
    };
    const told: PingMessage = {
      type: 'D',
      http_address: '10.0.0.2:8083',
      zmq_address: '10.0.0.2:8084',
      native: { version: 1, digest: 'd1', model: 'demo', sendType: 'PUT_ASYNC' },
    };
    expect(hex(encodePing(ping))).toBe(GOLDEN.ping);
    expect(decodePing(bytes(GOLDEN.ping))).toEqual(ping);
    expect(hex(encodePing(told))).toBe(GOLDEN['ping native']);
    expect(decodePing(bytes(GOLDEN['ping native']))).toEqual(told);
    const untold: PingMessage = { ...ping, native: { version: 1, digest: 'd1', model: 'demo' } };
    expect(decodePing(encodePing(untold))).toEqual(untold);
    const able: PingMessage = { ...told, native: { ...told.native!, features: ['overlap', 'later'] } };
    expect(decodePing(encodePing(able))).toEqual(able);
    const since: PingMessage = { ...told, native: { ...told.native!, started: 1_795_967_064_000 } };
    expect(decodePing(encodePing(since))).toEqual(since);
    const load = { running: 3, waiting: 300, kvUsed: 70_000, kvBlocks: 100_000, queuedTokens: 12_345 };
    const loaded: PingMessage = { ...told, native: { ...told.native!, load } };
    expect(hex(encodePing(loaded))).toBe(GOLDEN['ping native, with its load']);
    expect(decodePing(encodePing(loaded))).toEqual(loaded);
    for (const running of [-1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, '3' as unknown as number]) {
      const lie: PingMessage = { ...told, native: { ...told.native!, load: { ...load, running } } };
      expect(() => decodePing(encodePing(lie))).toThrow(/running is .*, not an integer from 0/);
    }
    const wrong = { ...told, native: { ...told.native!, features: 'overlap' as unknown as string[] } };
    expect(() => decodePing(encodePing(wrong))).toThrow(/features are "overlap", not a list/);
  });

  test('dimensions beyond 32 bits', () => {
    const message: WireMessage = {
      cmd: 'PUT',
      tensor_id,
      shape: [1, 70_000, 5_000_000_000],
      dtype: 'uint8',
    };
    const golden = `84a3636d64a3505554a974656e736f725f6964d926${Buffer.from(tensor_id).toString('hex')}a573686170659301ce00011170cf000000012a05f200a56474797065a575696e7438`;
    expect(hex(encodeMessage(message))).toBe(golden);
    expect(decodeMessage(bytes(golden), huge)).toEqual(message);
  });
});

function kindOf(act: () => unknown): string {
  try {
    act();
  } catch (error) {
    expect(error).toBeInstanceOf(PdError);
    return `${(error as PdError).code} ${protocolErrorKind(error)}`;
  }
  return 'accepted';
}

describe('what a peer must not send', () => {
  const MALFORMED = 'MESSAGE_INVALID malformed';
  const BAD_FIELD = 'MESSAGE_INVALID bad_field';
  const LIMIT = 'LIMIT_EXCEEDED limit';
  test.each<[string, Uint8Array, string]>([
    ['nothing', new Uint8Array(0), MALFORMED],
    ['text', Buffer.from('hello'), MALFORMED],
    ['an array', encode([1, 2]), MALFORMED],
    ['a number', encode(7), MALFORMED],
    ['the unused byte', bytes('c1'), MALFORMED],
    ['a truncated map', bytes('82a3636d64'), MALFORMED],
    ['bytes after the end', bytes('8000'), MALFORMED],
    ['a map with the key __proto__', bytes('81a95f5f70726f746f5f5f01'), MALFORMED],
    ['a map with a number array as key', bytes('819101a0'), MALFORMED],
    ['nested array headers, 4 bytes of claim each', bytes('dd7fffffff'.repeat(50)), LIMIT],
    ['nested array headers, one byte each', new Uint8Array(60_000).fill(0x91), LIMIT],
    ['nested maps', bytes('81a161'.repeat(5000)), LIMIT],
    ['a body beyond 64 KiB', new Uint8Array(65_537), LIMIT],
    ['an array that claims more than there is', bytes('81a16190').subarray(0, 3), MALFORMED],
    ['a string of 20 KB', encode({ cmd: 'x'.repeat(20_000) }), LIMIT],
    ['a bin of 8 KB', encode({ cmd: 'NEW', unique_id: new Uint8Array(8192) }), LIMIT],
    ['100 keys', encode(Object.fromEntries(Array.from({ length: 100 }, (_, i) => [`k${i}`, i]))), LIMIT],
    ['no command', encode({}), BAD_FIELD],
    ['a command that is a number', encode({ cmd: 1 }), BAD_FIELD],
    ['an unknown command', encode({ cmd: 'DROP' }), 'MESSAGE_INVALID unknown_command'],
    ['a command of older versions of ours', encode({ cmd: 'CLOSE' }), 'MESSAGE_INVALID unknown_command'],
    ['NEW without id', encode({ cmd: 'NEW' }), BAD_FIELD],
    ['NEW with 127 bytes', encode({ cmd: 'NEW', unique_id: new Uint8Array(127) }), BAD_FIELD],
    ['NEW with a string', encode({ cmd: 'NEW', unique_id: 'x'.repeat(128) }), BAD_FIELD],
    ['NEW with pd of 1', encode({ cmd: 'NEW', unique_id: uniqueId, pd: 1 }), BAD_FIELD],
    ['tensor id without #', encode({ ...put, tensor_id: 'cmpl-x' }), BAD_FIELD],
    ['tensor id of 5000', encode({ ...put, tensor_id: `${'x'.repeat(5000)}#l` }), LIMIT],
    ['tensor id that is a number', encode({ ...put, tensor_id: 7 }), BAD_FIELD],
    ['GET without id', encode({ cmd: 'GET' }), BAD_FIELD],
    ['negative dimension', encode({ ...put, shape: [2, -3] }), BAD_FIELD],
    ['zero dimension', encode({ ...put, shape: [0, 4] }), BAD_FIELD],
    ['fractional dimension', encode({ ...put, shape: [2, 1.5] }), BAD_FIELD],
    ['NaN dimension', encode({ ...put, shape: [Number.NaN] }), BAD_FIELD],
    [
      'dimension of 2^63',
      bytes(hex(encode({ ...put, shape: [1] })).replace('9101', '91cf8000000000000000')),
      BAD_FIELD,
    ],
    ['string dimension', encode({ ...put, shape: ['2'] }), BAD_FIELD],
    ['no shape', encode({ ...put, shape: null }), BAD_FIELD],
    ['scalar shape', encode({ ...put, shape: [] }), BAD_FIELD],
    ['9 dimensions', encode({ ...put, shape: Array(9).fill(1) }), LIMIT],
    ['product beyond the limit', encode({ ...put, shape: [2 ** 20, 2 ** 12] }), LIMIT],
    ['product beyond 2^53', encode({ ...put, shape: Array(8).fill(2 ** 52) }), LIMIT],
    ['unknown dtype', encode({ ...put, dtype: 'complex64' }), 'DTYPE_UNKNOWN unknown_dtype'],
    [
      'dtype named like a property of objects',
      encode({ ...put, dtype: 'toString' }),
      'DTYPE_UNKNOWN unknown_dtype',
    ],
    ['dtype that is a number', encode({ ...put, dtype: 2 }), BAD_FIELD],
  ])('%s', (_name, body, expected) => {
    expect(kindOf(() => decodeMessage(body, limits))).toBe(expected);
  });

  test('a tensor of exactly the limit is allowed, one byte more is not', () => {
    const of = (dims: number[]) => encode({ ...put, shape: dims, dtype: 'uint8' });
    expect(kindOf(() => decodeMessage(of([2 ** 16, 2 ** 16]), limits))).toBe('accepted');
    expect(kindOf(() => decodeMessage(of([2 ** 32 + 1]), limits))).toBe(LIMIT);
  });

  test('fields that this version does not know are ignored', () => {
    const body = encode({ ...put, extra: { deep: [1, [2]] }, when: new Date(0) });
    expect(decodeMessage(body, limits)).toEqual(put);
    expect(decodeAnswer(encode({ ret: 1, extra: 1 }), limits)).toEqual({ kind: 'get', ret: 1 });
    // older versions of ours
    const numbered = { pd: { seq: 7 } };
    expect(decodeMessage(encode({ cmd: 'GET', tensor_id, ...numbered }), limits)).toEqual({
      cmd: 'GET',
      tensor_id,
    });
    expect(decodeAnswer(encode({ ret: 1, ...numbered }), limits)).toEqual({ kind: 'get', ret: 1 });
  });

  test('answers and pings', () => {
    expect(kindOf(() => decodeAnswer(Buffer.from('3'), limits))).toBe(MALFORMED);
    expect(kindOf(() => decodeAnswer(encode({ ret: 2 }), limits))).toBe(BAD_FIELD);
    expect(kindOf(() => decodeAnswer(encode({ ret: 0, shape: [2] }), limits))).toBe(BAD_FIELD);
    expect(kindOf(() => decodeAnswer(encode({ pd: { version: 1 } }), limits))).toBe(BAD_FIELD);
    for (const near of ['text', [1], Array.from({ length: 9 }, () => 'a')]) {
      expect(kindOf(() => decodeAnswer(encode({ ret: 1, pd: { near } }), limits))).toBe(
        'MESSAGE_INVALID bad_field',
      );
    }
    expect(kindOf(() => decodePing(encode({ type: 'X', http_address: 'a:1', zmq_address: 'a:2' })))).toBe(
      BAD_FIELD,
    );
    expect(kindOf(() => decodePing(encode({ type: 'P', http_address: 7, zmq_address: 'a:2' })))).toBe(
      BAD_FIELD,
    );
  });

  test('a refusal with a code of a later version keeps its message', () => {
    const body = encode({
      pd: { version: 9, features: [], send_type: 'PUT', refused: { code: 'NOVEL', message: 'why' } },
    });
    expect(decodeAnswer(body, limits)).toMatchObject({
      refused: { code: 'MESSAGE_INVALID', message: 'why' },
    });
  });

  test('our own messages that break the limits do not leave', () => {
    expect(kindOf(() => encodeMessage({ ...put, tensor_id: `${'x'.repeat(5000)}#l` as TensorId }))).toBe(
      LIMIT,
    );
    expect(kindOf(() => encodeMessage({ ...put, shape: [1.5] }))).toBe(BAD_FIELD);
    expect(kindOf(() => encodeMessage({ cmd: 'NEW', unique_id: new Uint8Array(64) as UniqueId }))).toBe(
      BAD_FIELD,
    );
  });

  test('the id of a NEW does not share memory with the message', () => {
    const body = encodeMessage({ cmd: 'NEW', unique_id: uniqueId });
    const message = decodeMessage(body, limits);
    body.fill(0);
    expect(message).toEqual({ cmd: 'NEW', unique_id: uniqueId });
  });
});

const text = (most: number) => fc.string({ minLength: 1, maxLength: most, unit: 'binary' });
const dtype = fc.constantFrom(...(Object.keys(DTYPE_BYTES) as Dtype[]));
const shape = fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 5 });
const tensorId = fc.tuple(text(200), text(40)).map(([id, layer]) => `${id}#${layer}` as TensorId);
const helloArb: fc.Arbitrary<PeerHello> = fc
  .record({
    version: fc.integer({ min: 1, max: 1000 }),
    features: fc.array(text(64), { maxLength: 32 }),
    sendType: fc.constantFrom('PUT', 'PUT_ASYNC', 'GET'),
  })
  .chain((base) => fc.constantFrom(base, { ...base, fingerprint: hello.fingerprint! }));
const digest = text(64);
const prompted = fc.record({ promptDigest: digest }, { requiredKeys: [], noNullPrototype: true });
const messageArb: fc.Arbitrary<WireMessage> = fc.oneof(
  fc.record(
    {
      cmd: fc.constant('NEW' as const),
      unique_id: fc.uint8Array({ minLength: 128, maxLength: 128 }).map((id) => id as UniqueId),
      native: helloArb,
    },
    { requiredKeys: ['cmd', 'unique_id'], noNullPrototype: true },
  ),
  fc.record(
    { cmd: fc.constant('PUT' as const), tensor_id: tensorId, shape, dtype, native: prompted },
    { requiredKeys: ['cmd', 'tensor_id', 'shape', 'dtype'], noNullPrototype: true },
  ),
  fc.record({ cmd: fc.constant('GET' as const), tensor_id: tensorId }),
);
const answerArb: fc.Arbitrary<Answer> = fc.oneof(
  fc.constantFrom({ kind: 'send' as const }, { kind: 'no-room' as const }, { kind: 'no-pair' as const }),
  fc.record(
    {
      kind: fc.constant('get' as const),
      ret: fc.constant(0 as const),
      shape,
      dtype,
      promptDigest: digest,
    },
    { requiredKeys: ['kind', 'ret', 'shape', 'dtype'], noNullPrototype: true },
  ),
  fc.record({ kind: fc.constant('get' as const), ret: fc.constant(1 as const) }),
  fc.record({ kind: fc.constant('hello' as const), hello: helloArb }),
);

describe('properties', () => {
  test('what is encoded comes back equal', () => {
    fc.assert(
      fc.property(messageArb, (message) => {
        expect(decodeMessage(encodeMessage(message), huge)).toEqual(message);
      }),
    );
    fc.assert(
      fc.property(answerArb, (answer) => {
        expect(decodeAnswer(encodeAnswer(answer), huge)).toEqual(answer);
      }),
    );
  });

  test('any bytes, and any message with bytes changed, are read or refused with a PdError of a known kind', () => {
    const mutated = fc
      .tuple(messageArb, fc.array(fc.tuple(fc.nat(), fc.nat(255)), { maxLength: 6 }), fc.nat(), fc.boolean())
      .map(([message, changes, cut, cuts]) => {
        const body = encodeMessage(message).slice();
        for (const [at, byte] of changes) body[at % body.length] = byte;
        return cuts ? body.subarray(0, cut % body.length) : body;
      });
    fc.assert(
      fc.property(fc.oneof(mutated, fc.uint8Array({ maxLength: 300 })), (body) => {
        for (const decode of [decodeMessage, decodeAnswer, decodePing]) {
          try {
            decode(body, limits);
          } catch (error) {
            if (!(error instanceof PdError) || error.context['kind'] !== protocolErrorKind(error))
              throw error;
          }
        }
      }),
      { numRuns: 2_000 },
    );
  });
});
