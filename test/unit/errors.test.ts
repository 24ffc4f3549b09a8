import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { ERRORS_DOC, renderErrors } from '../../scripts/errors-doc.ts';
import { ERROR_TABLE, PdError } from '../../src/errors.ts';
import { openAiError } from '../../src/openai-error.ts';

const SRC = fileURLToPath(new URL('../../src', import.meta.url));

test('docs/errors.md lists the codes as they are', () => {
  expect(readFileSync(ERRORS_DOC, 'utf8')).toBe(renderErrors());
});

test('every code is given by something', () => {
  const sources = readdirSync(SRC, { recursive: true, encoding: 'utf8' }).filter((path) =>
    path.endsWith('.ts'),
  );
  const text = sources.map((path) => readFileSync(join(SRC, path), 'utf8')).join();
  expect(Object.keys(ERROR_TABLE).filter((code) => !text.includes(`'${code}'`))).toEqual([]);
});

test('an error keeps code, message and context across threads', () => {
  const error = new PdError('PEER_LOST', 'sending x', { peer: '127.0.0.1:1' }, { cause: new Error('reset') });
  const back = PdError.fromData(structuredClone(error.toData()));
  expect(back).toMatchObject({ code: 'PEER_LOST', message: 'sending x', context: { peer: '127.0.0.1:1' } });
  expect(back.hint).toContain('peer');
  expect(PdError.from(back)).toBe(back);
  expect(PdError.from(new TypeError('odd')).code).toBe('INTERNAL');
});

test('causes of ours travel along, across threads and in the answers that clients get', () => {
  const full = new PdError('KV_BUFFER_FULL', 'no room for x', { tensorId: 'x', peer: '127.0.0.1:1' });
  const failed = new PdError('KV_LOAD_FAILED', 'KV of r', { requestId: 'r' }, { cause: full });
  const back = PdError.fromData(structuredClone(failed.toData()));
  expect(back.cause).toMatchObject({ code: 'KV_BUFFER_FULL', context: { tensorId: 'x' } });
  expect(openAiError(back).error).toEqual({
    message: 'KV of r',
    type: 'server_error',
    param: null,
    code: 'KV_LOAD_FAILED',
    context: { requestId: 'r' },
    cause: { code: 'KV_BUFFER_FULL', message: 'no room for x', context: full.context },
  });
  const bad = new PdError('REQUEST_INVALID', 'n is 0', { param: 'n' }, { cause: full });
  expect(openAiError(bad).error).toEqual({
    message: 'n is 0',
    type: 'invalid_request_error',
    param: 'n',
    code: 'REQUEST_INVALID',
  });
});
