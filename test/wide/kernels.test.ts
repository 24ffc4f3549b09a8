import { execFileSync } from 'node:child_process';
import { expect, test } from 'vitest';

test('the sources of the kernels compile, where there is nvcc', () => {
  const said = execFileSync('scripts/build-kernels.sh', ['--compile'], { encoding: 'utf8' });
  expect(said).toContain('manifest matches');
});
