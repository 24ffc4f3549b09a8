import { expect, test } from 'vitest';
import { refusalOf } from '../../../../src/transfer/native/hello.ts';
import type { CacheShape, HelloMessage, Nonce } from '../../../../src/transfer/native/messages.ts';

const CACHE: CacheShape = { blocks: 8, blockSize: 4, layers: 2, blockBytes: 64, family: 'kv-first' };
const hello = (cache: Partial<CacheShape> = {}, rest: Partial<HelloMessage> = {}): HelloMessage => ({
  cmd: 'HELLO',
  from: 'p'.repeat(32) as Nonce,
  hello: { version: 1, features: ['native'], sendType: 'PUT' },
  cache: { ...CACHE, ...cache },
  transports: ['nccl'],
  ...rest,
});

test.each([
  ['blockSize 4, b has 8', 'FINGERPRINT_MISMATCH', hello({ blockSize: 8 })],
  ['layers 2, b has 3', 'FINGERPRINT_MISMATCH', hello({ layers: 3 })],
  ['blockBytes 64, b has 32', 'FINGERPRINT_MISMATCH', hello({ blockBytes: 32 })],
  ['no way for KV', 'TRANSPORT_MISMATCH', hello({}, { transports: ['host'] })],
] as const)(
  'caches of another geometry, and ends without a common way, exchange nothing: %s',
  (text, code, theirs) => {
    expect(refusalOf(hello(), theirs, 'a', 'b')).toMatchObject({
      code,
      message: expect.stringContaining(text),
    });
  },
);

test('numbers of blocks, families and send types may differ', () => {
  const theirs = hello({ blocks: 999, family: 'blocks-first' });
  const other = { ...theirs, hello: { ...theirs.hello, sendType: 'GET' as const } };
  expect(refusalOf(hello(), other, 'a', 'b')).toBeUndefined();
});
