import { expect, test } from 'vitest';
import { expectMatrix } from '../support/experiment-matrix.ts';

test('the experiment matrix on host: full ids meet only where nobody randomizes, transfer ids always', async () => {
  expect.hasAssertions();
  await expectMatrix('host');
});
