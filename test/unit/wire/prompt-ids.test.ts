import fc from 'fast-check';
import { expect, test } from 'vitest';
import { PdError } from '../../../src/errors.ts';
import { appendPromptIds, splitPromptIds } from '../../../src/wire/prompt-ids.ts';

const bytes = fc.uint8Array({ maxLength: 64 }).map((each) => new Uint8Array(each));
const ids = fc.uint32Array({ minLength: 1, maxLength: 64 });

test('what is put behind a body is found there again, and the body as it was', () => {
  fc.assert(
    fc.property(bytes, ids, (body, some) => {
      const sent = appendPromptIds(body, some);
      const split = splitPromptIds(sent, String(some.length));
      expect([[...split.body], [...split.ids!]]).toEqual([[...body], [...some]]);
    }),
  );
  // As the protocol has it: 4 bytes each, little-endian.
  expect([...appendPromptIds(Uint8Array.of(123), Uint32Array.of(1, 0x01020304))]).toEqual([
    ...[123, 1, 0, 0, 0],
    ...[4, 3, 2, 1],
  ]);
});

test('without the header all is the body; a header that cannot be right is refused', () => {
  const body = new Uint8Array(8);
  expect(splitPromptIds(body, undefined)).toEqual({ body });
  expect(splitPromptIds(body, '2').ids).toHaveLength(2);
  for (const header of ['3', '0', '-1', '1e0', '', ' 1', '9999999999', ['1', '1']]) {
    expect(() => splitPromptIds(body, header), String(header)).toThrow(PdError);
  }
});
