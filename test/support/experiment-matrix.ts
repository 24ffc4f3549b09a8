/** The experiment as people run it: every cell is as expected, and what stops says why. */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect } from 'vitest';

const script = fileURLToPath(new URL('../../scripts/experiment-matrix.sh', import.meta.url));

interface Row {
  readonly sendType: string;
  readonly kvKey: string;
  readonly randomized: boolean;
  readonly result: string;
  readonly asExpected: boolean;
  readonly bytes: number;
  readonly computed: number;
  readonly message: string;
  readonly producerId: string;
  readonly consumerId: string;
}

/** Full ids meet only where nobody randomizes, transfer ids always. */
export async function expectMatrix(
  device: 'host' | 'cuda',
  more: Record<string, string> = {},
): Promise<void> {
  // The build is there: all tests share it.
  const env = { ...process.env, ...more, PD_SKIP_BUILD: '1' };
  // The KV of what should stop is on its way for some time, too: its error names what came instead.
  const args = ['--json', '--deadline', '4s', '--device', device];
  // Exit status 1 says that a cell is not as expected: which one, and why, is in the rows.
  const { stdout, stderr } = await promisify(execFile)(script, args, { env }).catch(
    (error: { stdout: string; stderr: string }) => error,
  );
  expect(stdout, stderr).toContain('[');
  const rows = JSON.parse(stdout) as Row[];
  expect(rows).toHaveLength(12);
  expect(
    new Set(rows.map(({ sendType, kvKey, randomized }) => `${sendType} ${kvKey} ${randomized}`)).size,
  ).toBe(12);
  for (const row of rows) {
    const { kvKey, randomized, result, message } = row;
    expect(row.asExpected, message).toBe(true);
    if (kvKey === 'engine' && randomized) {
      expect(result).toBe('stops');
      expect(message).toContain(`waited for ${row.consumerId}#model.layers.0.self_attn.attn`);
      expect(message).toContain(`held instead: ${row.producerId}#`);
    } else {
      expect(row).toMatchObject({ result: 'passes', computed: 1 });
      expect(row.bytes).toBeGreaterThan(0);
    }
  }
}
