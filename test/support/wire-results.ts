/** wire-results.sh as people run it: our engines beside the Python peer, on the host, or by blocking NCCL on stand-in GPUs. */
import { execFile } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect } from 'vitest';
import type { WireResult } from '../../bench/wire/result.ts';
import { pythonWith } from '../../support/python-peer.ts';
import { standInEnvironment } from '../stand-ins/build.ts';

const script = fileURLToPath(new URL('../../scripts/wire-results.sh', import.meta.url));
const standInTorch = fileURLToPath(new URL('../stand-ins/python', import.meta.url));

export const wireResultsPython = pythonWith('msgpack');

/** Its exit code, its last lines, and both files that it wrote. `more` goes into its environment. */
export async function runWireResults(
  device: 'host' | 'cuda',
  args: readonly string[] = [],
  more: Record<string, string> = {},
) {
  const out = mkdtempSync(join(tmpdir(), 'pd-wire-'));
  try {
    const env = {
      ...process.env,
      ...(device === 'cuda' && {
        ...standInEnvironment(),
        ...{ PYTHONPATH: standInTorch, PD_STANDIN_MEMORY_MB: '8192' },
      }),
      ...more,
      // The build is there: all tests share it.
      ...{ PD_SKIP_BUILD: '1', PD_TEST_PYTHON: wireResultsPython! },
    };
    const all = ['--device', device, '--small', '--only', 'peer', '--out', out, ...args];
    const ended = await promisify(execFile)(script, all, { env }).then(
      ({ stdout }) => ({ code: 0, stdout }),
      ({ code, stdout }: { code: number; stdout: string }) => ({ code, stdout }),
    );
    const [json, markdown] = ['.json', '.md'].map((ending) =>
      readFileSync(join(out, readdirSync(out).find((name) => name.endsWith(`-wire${ending}`))!), 'utf8'),
    );
    return { ...ended, result: JSON.parse(json!) as WireResult, markdown: markdown! };
  } finally {
    rmSync(out, { recursive: true, force: true });
  }
}

/** Every byte right in all ways of sending, families and restarts, and the report says so. */
export async function expectEveryByteRight(device: 'host' | 'cuda'): Promise<void> {
  const { code, stdout, result, markdown } = await runWireResults(device);
  expect(result.problems).toEqual([]);
  expect([code, stdout]).toEqual([0, expect.stringContaining('all passed')]);
  const groups = new Set(result.peer!.rows.map(({ group }) => group));
  for (const way of [
    'PUT, Python to ours',
    'PUT, ours to Python',
    'PUT_ASYNC, Python to ours',
    'PUT_ASYNC, ours to Python',
    'GET, Python from ours',
    'GET, ours from Python',
    'families, PUT into our cache',
    'families, GET of our cache',
    'restarts',
  ]) {
    expect(groups).toContain(way);
    expect(markdown).toContain(`### ${way}\n`);
  }
  expect(result.peer!.peer['transport']).toBe(device === 'cuda' ? 'nccl' : 'host');
  expect(markdown).toContain('Command: `./scripts/wire-results.sh --device');
}
