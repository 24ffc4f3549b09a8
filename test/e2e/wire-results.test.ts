/** wire-results.sh as people run it: our engines beside the Python peer, on the host, and by blocking NCCL on stand-in GPUs. */
import { execFile } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { WireResult } from '../../bench/wire/result.ts';
import { standInEnvironment } from '../stand-ins/build.ts';
import { pythonWith } from '../support/python-peer.ts';

const script = fileURLToPath(new URL('../../scripts/wire-results.sh', import.meta.url));
const standInTorch = fileURLToPath(new URL('../stand-ins/python', import.meta.url));
const python = pythonWith('msgpack');

let out: string;
beforeEach(() => {
  out = mkdtempSync(join(tmpdir(), 'pd-wire-'));
});
afterEach(() => rmSync(out, { recursive: true, force: true }));

async function run(device: string, more: Record<string, string>) {
  // The build is there: all tests share it.
  const env = { ...process.env, ...more, PD_SKIP_BUILD: '1', PD_TEST_PYTHON: python! };
  const args = ['--device', device, '--small', '--only', 'peer', '--out', out];
  const ended = await promisify(execFile)(script, args, { env }).then(
    ({ stdout }) => ({ code: 0, stdout }),
    ({ code, stdout }: { code: number; stdout: string }) => ({ code, stdout }),
  );
  const [json, markdown] = ['.json', '.md'].map((ending) =>
    readFileSync(join(out, readdirSync(out).find((name) => name.endsWith(`-wire${ending}`))!), 'utf8'),
  );
  return { ...ended, result: JSON.parse(json!) as WireResult, markdown: markdown! };
}

const cuda = () => ({ ...standInEnvironment(), PYTHONPATH: standInTorch, PD_STANDIN_MEMORY_MB: '8192' });

describe.skipIf(python === undefined)('wire-results.sh', () => {
  test.each(['host', 'cuda'] as const)(
    'on %s: every byte right in all ways of sending, families and restarts; the report says so',
    { timeout: 180_000 },
    async (device) => {
      const { code, stdout, result, markdown } = await run(device, device === 'cuda' ? cuda() : {});
      expect(result.problems).toEqual([]);
      expect([code, stdout]).toEqual([0, expect.stringContaining('all as it should be')]);
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
    },
  );

  test('a pair that never opens ends in time, as failures that name the call', {
    timeout: 180_000,
  }, async () => {
    const { code, result } = await run('cuda', { ...cuda(), PD_STANDIN_FAULTS: 'init=hang' });
    expect(code).toBe(1);
    expect(result.problems.join('\n')).toMatch(/ncclCommInitRank as rank 0 has not returned after/);
    expect(result.peer?.error).toMatch(/3 checks have failed: the rest was not tried/);
  });
});
