import { expect, test } from 'vitest';
import { standInEnvironment } from '../stand-ins/build.ts';
import { expectMatrix } from '../support/experiment-matrix.ts';

test('the experiment matrix on stand-in GPUs: full ids meet only where nobody randomizes, transfer ids always', async () => {
  expect.hasAssertions();
  await expectMatrix('cuda', standInEnvironment());
});

test('the experiment matrix on host: full ids meet only where nobody randomizes, transfer ids always', async () => {
  expect.hasAssertions();
  await expectMatrix('host');
});
