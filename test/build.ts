import { execFileSync } from 'node:child_process';

/** Vitest's global set-up: the worker entries that tests start are built JavaScript. */
export default function build(): void {
  if (process.env['PD_TEST_SKIP_BUILD'] === '1') return;
  execFileSync('npx', ['tsc', '-p', 'tsconfig.build.json'], { stdio: 'inherit' });
}
