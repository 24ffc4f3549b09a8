import { readFileSync } from 'node:fs';
import { expect, it } from 'vitest';
import { API_DOC, renderPage, undecided } from '../../../scripts/api-doc.ts';

it('docs/api.md tells of every field of OpenAI and vLLM what becomes of it', () => {
  expect(undecided()).toEqual([]);
  const page = readFileSync(API_DOC, 'utf8');
  expect(page).toBe(renderPage(page));
});
