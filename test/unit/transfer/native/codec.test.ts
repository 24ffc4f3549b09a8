import { decode, encode } from '@msgpack/msgpack';
import fc from 'fast-check';
import { describe, expect, it, test } from 'vitest';
import { PdError } from '../../../../src/errors.ts';
import { blockListBytes, decodeBlocks, encodeBlocks } from '../../../../src/transfer/native/block-list.ts';
import {
  decodeAnswered,
  decodeAsked,
  encodeNative,
  isNativeMessage,
  nativeBodyBytes,
  rehearseCodec,
} from '../../../../src/transfer/native/codec.ts';
import type { NativeMessage, Nonce, Ticket, WantMessage } from '../../../../src/transfer/native/messages.ts';
import { encodeMessage } from '../../../../src/wire/codec.ts';
import type { TensorId, TransferId } from '../../../../src/wire/ids.ts';
import { protocolErrorKind } from '../../../../src/wire/limits.ts';
import type { UniqueId } from '../../../../src/wire/messages.ts';
import { GOLDEN } from './golden.ts';

/** Blocks of a prompt of 131,072 tokens. */
const limits = { maxBlocks: 8_192 };
const consumer = 'd0'.repeat(16) as Nonce;
const producer = 'a0'.repeat(16) as Nonce;
const ticket = '000102030405060708090a0b0c0d0e0f' as Ticket;
const promptDigest = '0123456789abcdef0123456789abcdef';
const samplingDigest = 'fedcba9876543210fedcba9876543210';
const id =
  'cmpl-___prefill_addr_10.0.0.1:8082___decode_addr_10.0.0.2:8084_0123456789abcdef0123456789abcdef-0' as TransferId;
const short = 'r-0' as TransferId;

const there = { from: consumer, to: producer };
const back = { from: producer, to: consumer, seq: 300, ticket };
const want: WantMessage = {
  cmd: 'WANT',
  ...there,
  seq: 300,
  ticket,
  floor: 298,
  id,
  promptDigest,
  tokens: 141,
  skip: 2,
  blocks: [7, 8, 9, 10, 3, 500, 501],
  slot: 5,
  samplingDigest,
  transport: 'direct',
};
const { slot: _, ...withoutPage } = want;
const done = { cmd: 'DONE', ...back, samplingDigest, promised: 7, written: 7 } as const;
const MESSAGES: Record<keyof typeof GOLDEN, NativeMessage> = {
  HELLO: {
    cmd: 'HELLO',
    from: consumer,
    hello: { version: 1, features: ['native'], sendType: 'PUT_ASYNC' },
    cache: { blocks: 5_000, blockSize: 16, layers: 32, blockBytes: 65_536, family: 'kv-first' },
    transports: ['direct', 'nccl'],
    direct: { bootId: 'b-1', path: '/run/pd/0123456789abcdef' },
  },
  'HELLO refused': {
    cmd: 'HELLO',
    from: producer,
    hello: { version: 1, features: ['native'], sendType: 'GET' },
    cache: { blocks: 2, blockSize: 1, layers: 1, blockBytes: 8, family: 'mla' },
    transports: ['host'],
    refused: { code: 'FINGERPRINT_MISMATCH', message: 'other models' },
  },
  'HELLO that asks': {
    cmd: 'HELLO',
    from: producer,
    hello: { version: 1, features: ['native'], sendType: 'PUT' },
    cache: { blocks: 2, blockSize: 1, layers: 1, blockBytes: 8, family: 'mla' },
    transports: ['host'],
    probe: short,
  },
  PAIR: {
    cmd: 'PAIR',
    from: producer,
    to: consumer,
    uniqueId: Uint8Array.from({ length: 128 }, (_, i) => i) as UniqueId,
  },
  WANT: want,
  'WANT without a page': {
    ...withoutPage,
    seq: 1,
    floor: 1,
    id: short,
    tokens: 1,
    skip: 0,
    blocks: [0],
    transport: 'host',
  },
  DROP: { cmd: 'DROP', ...there, want: { seq: 300, ticket }, floor: 298, id: short },
  'DROP of an id': { cmd: 'DROP', ...there, floor: 301, id: short },
  ACK: { cmd: 'ACK', ...there, seq: 300, ticket, floor: 301 },
  HELD: { cmd: 'HELD', ...back, state: 'writing' },
  PART: { cmd: 'PART', ...back, part: 70_000, layer: 16, layers: 8, block: 2, blocks: 5 },
  DONE: { ...done, drawn: [128_255] },
  'DONE with logprobs': {
    ...done,
    drawn: [5],
    logprobs: [
      {
        token: 5,
        logprob: -0.25,
        top: [
          { token: 5, logprob: -0.25 },
          { token: 9, logprob: Number.NEGATIVE_INFINITY },
        ],
      },
    ],
  },
  'DONE without a token': { ...done, drawn: [] },
  FAIL: { cmd: 'FAIL', ...back, code: 'KV_SEND_FAILED', message: 'the prompt differs' },
  DROPPED: { cmd: 'DROPPED', ...back },
};

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const bytes = (text: string) => Uint8Array.from(Buffer.from(text, 'hex'));
const decodeAny = (body: Uint8Array, { cmd }: Pick<NativeMessage, 'cmd'>) =>
  cmd === 'WANT' || cmd === 'DROP' || cmd === 'ACK'
    ? decodeAsked(body, limits)
    : decodeAnswered(body, limits);
const kindOf = (run: () => unknown) => {
  try {
    run();
    return 'nothing';
  } catch (error) {
    return error instanceof PdError ? protocolErrorKind(error) : 'another error';
  }
};
const range = (length: number, from = 0) => Array.from({ length }, (_, i) => from + i);

describe('bytes of the native hand-over', () => {
  test.each(Object.entries(MESSAGES))('%s', (name, message) => {
    const golden = GOLDEN[name as keyof typeof GOLDEN];
    expect(hex(encodeNative(message, limits))).toBe(golden);
    expect(decodeAny(bytes(golden), message)).toEqual(message);
    expect(isNativeMessage(bytes(golden))).toBe(true);
  });

  it('are told from those of the frozen wire', () => {
    const tensor_id = 'r#l' as TensorId;
    expect(isNativeMessage(encodeMessage({ cmd: 'GET', tensor_id }))).toBe(false);
    expect(isNativeMessage(encode({ cmd: 'CLOSE' }))).toBe(false);
    expect(isNativeMessage(encode({ cmd: 'DROPS' }))).toBe(false);
    expect(isNativeMessage(encode({ ret: 1 }))).toBe(false);
    expect(isNativeMessage(Uint8Array.of())).toBe(false);
    expect(isNativeMessage(Buffer.from('0'))).toBe(false);
  });

  it('go one way each', () => {
    expect(kindOf(() => decodeAnswered(bytes(GOLDEN.WANT), limits))).toBe('unknown_command');
    expect(kindOf(() => decodeAsked(bytes(GOLDEN.DONE), limits))).toBe('unknown_command');
  });
});

describe('lists of blocks', () => {
  const lists: Record<string, (count: number) => number[]> = {
    'in one run': (count) => range(count, 40),
    backwards: (count) => range(count).reverse(),
    'no two of them neighbours': (count) => range(count).map((i) => ((i * 7_919) % count) * 2),
  };
  const sizes: Record<string, [count: number, bytes: number][]> = {
    'in one run': [
      [1_024, 4],
      [1_025, 4],
      [8_192, 4],
    ],
    backwards: [
      [1_024, 1_025],
      [1_025, 1_026],
      [8_192, 8_195],
    ],
    'no two of them neighbours': [
      [1_024, 3_072],
      [1_025, 3_075],
      [8_192, 24_576],
    ],
  };
  for (const [how, listOf] of Object.entries(lists)) {
    test.each(sizes[how]!)(`%i blocks ${how} are at most %i bytes`, (count, most) => {
      const blocks = listOf(count);
      expect(encodeBlocks(blocks).length).toBeLessThanOrEqual(most);
      const message = { ...want, tokens: count * 16, skip: 0, blocks };
      expect(decodeAsked(encodeNative(message, limits), limits)).toEqual(message);
    });
  }

  it('may be as long as the longest prompt, and no longer', () => {
    const message = { ...want, blocks: range(8_193) };
    expect(kindOf(() => encodeNative(message, limits))).toBe('limit');
    const body = encodeNative(message, { maxBlocks: 8_193 });
    expect(kindOf(() => decodeAsked(body, limits))).toBe('limit');
    // of a million tokens, scattered: far more than the frozen wire's 64 KiB
    const wide = { maxBlocks: 65_536 };
    const scattered = { ...want, blocks: range(65_536).map((i) => ((i * 40_503) % 65_536) * 16) };
    const long = encodeNative(scattered, wide);
    expect(long.length).toBeGreaterThan(128 * 1024);
    expect(long.length).toBeLessThan(nativeBodyBytes(wide));
    expect(decodeAsked(long, wide)).toEqual(scattered);
  });

  it('come back as they were, in no more bytes than are allowed', () => {
    fc.assert(
      fc.property(fc.uniqueArray(fc.nat(2 ** 31 - 1), { maxLength: 60 }), (blocks) => {
        const packed = encodeBlocks(blocks);
        expect(packed.length).toBeLessThanOrEqual(blockListBytes(blocks.length));
        expect(decodeBlocks(packed, blocks.length, 'test')).toEqual(blocks);
      }),
    );
  });

  it('cannot claim more than was announced, whatever the bytes are', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 40 }), fc.nat(20), (packed, count) => {
        let blocks: number[] | undefined;
        expect(['nothing', 'bad_field']).toContain(
          kindOf(() => {
            blocks = decodeBlocks(packed, count, 'test');
          }),
        );
        if (!blocks) return;
        expect(blocks).toHaveLength(count);
        expect(new Set(blocks).size).toBe(count);
        expect(blocks.every((block) => Number.isInteger(block) && block >= 0 && block < 2 ** 31)).toBe(true);
      }),
      { numRuns: 1_000 },
    );
  });

  test.each([
    ['a run of four thousand million blocks', '01feffffff0f', 4],
    ['a block twice', '000300', 3],
    ['a block below 0', '02', 1],
    ['half a number', '80', 1],
    ['a number without end', '808080808000', 1],
    ['fewer than announced', '00', 2],
  ])('are refused: %s', (_name, packed, count) => {
    expect(kindOf(() => decodeBlocks(bytes(packed), count, 'test'))).toBe('bad_field');
  });
});

describe('what is refused', () => {
  const fields = decode(bytes(GOLDEN.WANT)) as Record<string, unknown>;
  const doneFields = decode(bytes(GOLDEN['DONE with logprobs'])) as Record<string, unknown>;
  test.each([
    ['a nonce that is no bytes', { from: 'd0' }, 'bad_field'],
    ['a short nonce', { to: new Uint8Array(15) }, 'bad_field'],
    ['a ticket that is missing', { ticket: undefined }, 'bad_field'],
    ['seq 0', { seq: 0 }, 'bad_field'],
    ['a seq that is no integer', { seq: 1.5 }, 'bad_field'],
    ['floor 0', { floor: 0 }, 'bad_field'],
    ['an id of 4,097 characters', { id: 'x'.repeat(4_097) }, 'limit'],
    ['an empty id', { id: '' }, 'bad_field'],
    ['no blocks', { count: 0, blocks: new Uint8Array() }, 'bad_field'],
    ['blocks as numbers', { blocks: [1, 2, 3, 4, 5, 6, 7] }, 'bad_field'],
    ['another count', { count: 8 }, 'bad_field'],
    ['a count beyond the longest prompt', { count: 8_193 }, 'limit'],
    ['the slot of the header', { slot: 0 }, 'bad_field'],
    ['a slot beyond the page', { slot: 256 }, 'limit'],
    ['a transport that does not exist', { transport: 'pigeon' }, 'bad_field'],
  ])('WANT: %s', (_name, change, kind) => {
    const body = encode({ ...fields, ...change }, { ignoreUndefined: true });
    expect(kindOf(() => decodeAsked(body, limits))).toBe(kind);
  });

  test.each([
    ['drawn is no list', { drawn: 5 }, 'bad_field'],
    ['a token below 0', { drawn: [-1] }, 'bad_field'],
    ['more tokens than completions', { drawn: range(129), logprobs: undefined }, 'limit'],
    ['a logprob too few', { logprobs: [] }, 'bad_field'],
    ['a logprob that is no number', { logprobs: [[Number.NaN, []]] }, 'bad_field'],
    ['an alternative without a logprob', { logprobs: [[-1, [[5]]]] }, 'bad_field'],
    ['129 alternatives', { logprobs: [[-1, range(129).map((token) => [token, -1])]] }, 'limit'],
    ['more written than there can be', { written: 8_193 }, 'limit'],
  ])('DONE: %s', (_name, change, kind) => {
    const body = encode({ ...doneFields, ...change }, { ignoreUndefined: true });
    expect(kindOf(() => decodeAnswered(body, limits))).toBe(kind);
  });

  it('keeps keys that it does not know, and codes of a later version, from mattering', () => {
    expect(decodeAsked(encode({ ...fields, later: [1] }), limits)).toEqual(want);
    const fail = { ...(decode(bytes(GOLDEN.FAIL)) as object), code: 'OF_NEXT_YEAR' };
    expect(decodeAnswered(encode(fail), limits)).toMatchObject({ code: 'KV_SEND_FAILED' });
  });

  it('is a protocol error for any bytes, and whatever passes can be said again', () => {
    const mutated = fc
      .tuple(fc.constantFrom(...Object.values(GOLDEN)), fc.array(fc.tuple(fc.nat(400), fc.nat(255))))
      .map(([golden, changes]) => {
        const body = bytes(golden);
        for (const [at, byte] of changes) body[at % body.length] = byte;
        return body;
      });
    fc.assert(
      fc.property(fc.oneof(mutated, fc.uint8Array({ maxLength: 64 })), (body) => {
        for (const decodeOne of [decodeAsked, decodeAnswered]) {
          let message: NativeMessage | undefined;
          const kind = kindOf(() => {
            message = decodeOne(body, limits);
          });
          expect(kind).not.toBe('another error');
          if (!message) continue;
          // A long string loses a byte order mark at its start: to TextDecoder it is not part of the text.
          if (JSON.stringify(message).includes('\ufeff')) continue;
          expect(decodeOne(encodeNative(message, limits), limits)).toEqual(message);
        }
      }),
      { numRuns: 2_000 },
    );
  });
});

it('rehearses with messages that it takes', () => {
  expect(rehearseCodec).not.toThrow();
});
