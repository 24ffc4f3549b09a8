/** The header in which a producer tells that its KV will not come: any message goes in, and no header makes the proxy stumble. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { readKvFailed, writeKvFailed } from '../../../src/wire/overlap.ts';

describe('x-pd-kv-failed', () => {
  test('property: code and message come back, cut where they are long, from what a header may carry', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary', maxLength: 3_000 }), (message) => {
        const header = writeKvFailed({ code: 'PEER_UNREACHABLE', message, context: {} });
        expect(header).toMatch(/^[\x20-\x7e]{1,2100}$/);
        const read = readKvFailed(header);
        expect(read?.code).toBe('PEER_UNREACHABLE');
        const whole = message.replace(/\p{Surrogate}/gu, '\ufffd');
        expect(whole.startsWith(read?.message ?? 'x')).toBe(true);
        if (encodeURIComponent(whole).length <= 2_048) expect(read?.message).toBe(whole);
      }),
    );
  });

  test('property: whatever stands there is read or left', () => {
    fc.assert(
      fc.property(
        fc.oneof(fc.string(), fc.constantFrom('INTERNAL %', 'INTERNAL %zz', 'toString x')),
        (value) => {
          const read = readKvFailed(value);
          if (read) expect(value.startsWith(`${read.code} `)).toBe(true);
        },
      ),
    );
  });

  test.each([undefined, '', 'INTERNAL', 'NO_SUCH_CODE x', 'INTERNAL %', ['INTERNAL x']])(
    '%j says nothing',
    (value) => {
      expect(readKvFailed(value)).toBeUndefined();
    },
  );
});
