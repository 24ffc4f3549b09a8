import { execFileSync } from 'node:child_process';
import { buildStandIns } from './stand-ins/build.ts';

/** Vitest's global set-up, once per run: what tests start is built JavaScript, and the CUDA and NCCL under it are stand-ins in C. */
export default function build(): void {
  if (process.env['PD_TEST_SKIP_BUILD'] !== '1') execFileSync('./scripts/build.sh', { stdio: 'inherit' });
  buildStandIns();
}
