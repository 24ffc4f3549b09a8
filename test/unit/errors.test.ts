import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { ERRORS_DOC, renderErrors } from '../../scripts/errors-doc.ts';
import { PdError } from '../../src/errors.ts';

test('docs/errors.md lists the codes as they are', () => {
  expect(readFileSync(ERRORS_DOC, 'utf8')).toBe(renderErrors());
});

test('an error keeps code, message and context across threads', () => {
  const error = new PdError('PEER_LOST', 'sending x', { peer: '127.0.0.1:1' }, { cause: new Error('reset') });
  const back = PdError.fromData(structuredClone(error.toData()));
  expect(back).toMatchObject({ code: 'PEER_LOST', message: 'sending x', context: { peer: '127.0.0.1:1' } });
  expect(back.hint).toContain('peer');
  expect(PdError.from(back)).toBe(back);
  expect(PdError.from(new TypeError('odd')).code).toBe('INTERNAL');
});
