/** The header in which a producer tells that its KV will not come: any error goes in, and no header makes the proxy stumble. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { ErrorCode, ErrorData } from '../../../src/errors.ts';
import { readKvFailed, writeKvFailed } from '../../../src/wire/overlap.ts';

const text = (most: number) => fc.string({ unit: 'binary', maxLength: most });
const errorOf = (message: fc.Arbitrary<string>): fc.Arbitrary<ErrorData> =>
  fc.record({
    code: fc.constantFrom<ErrorCode>('PEER_UNREACHABLE', 'KV_BUFFER_FULL', 'INTERNAL'),
    message,
    context: fc.dictionary(text(20), fc.oneof(text(40), fc.integer(), fc.boolean()), {
      noNullPrototype: true,
    }),
  });
const caused = (message: fc.Arbitrary<string>) =>
  fc
    .tuple(errorOf(message), fc.option(errorOf(message)))
    .map(([error, cause]) => (cause ? { ...error, cause } : error));

describe('x-pd-kv-failed', () => {
  test('property: an error comes back with its cause', () => {
    const plain = fc.string({ maxLength: 200 });
    fc.assert(
      fc.property(caused(plain), (error) => {
        fc.pre(!('__proto__' in error.context) || Object.getPrototypeOf(error.context) === Object.prototype);
        const read = readKvFailed(writeKvFailed(error));
        expect([read?.code, read?.message, read?.cause?.code]).toEqual([
          error.code,
          error.message,
          error.cause?.code,
        ]);
      }),
    );
  });

  test('property: whatever is told goes into a header, and its code comes back', () => {
    fc.assert(
      fc.property(caused(text(3_000)), (error) => {
        const header = writeKvFailed(error);
        expect(header).toMatch(/^[\x20-\x7e]{1,4096}$/);
        expect(readKvFailed(header)?.code).toBe(error.code);
      }),
    );
  });

  test('property: whatever stands there is read or left', () => {
    const near = fc.json().map(encodeURIComponent);
    fc.assert(fc.property(fc.oneof(fc.string(), near), (value) => void readKvFailed(value)));
  });

  test.each([undefined, '', '%', '{}', 'null', '{"code":"NO_SUCH","message":"x"}', ['x']])(
    '%j says nothing',
    (value) => {
      expect(readKvFailed(value)).toBeUndefined();
    },
  );
});
