/** The lines of docs/operations.md with vLLM's configuration, as they stand there but for the ports. */
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { PATIENT } from '../support/cluster.ts';

const script = fileURLToPath(new URL('../../scripts/runbook.sh', import.meta.url));

test("the runbook's lines serve, its four prompts move KV, and the log says on which device", async () => {
  const { stdout } = await promisify(execFile)(script, ['--free-ports'], {
    env: { ...process.env, ...PATIENT, PD_SKIP_BUILD: '1' },
  });
  expect(stdout).toMatch(/\n1\d passed, 0 failed\n$/);
  if (existsSync('/dev/nvidia0')) return;
  expect(stdout).toContain(
    'Device: host, as no GPU is visible: there is no NVIDIA device file in /dev for CUDA_VISIBLE_DEVICES=0',
  );
});
