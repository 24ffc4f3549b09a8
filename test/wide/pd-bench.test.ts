/** pd-bench as a program: on the host, over stand-in GPUs, and the script that runs all of it. */
import { execFile } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, test } from 'vitest';
import type { Report } from '../../bench/transfer/report.ts';
import type { PartResult } from '../../bench/transfer/result.ts';
import { cacheBlocks } from '../../bench/transfer/shape.ts';
import { standInEnvironment } from '../stand-ins/build.ts';
import { tempDir } from '../support/temp-dir.ts';
import { keptPort } from '../support/transfer.ts';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const SMALL = ['--shape', 'tiny', '--kv-buffer-size', '64MiB'];
let standIns: Record<string, string>;

beforeAll(() => {
  standIns = standInEnvironment();
});

interface Ended {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

function run(file: string, args: readonly string[], env: Record<string, string> = {}): Promise<Ended> {
  return new Promise((resolve) => {
    // The build is there: all tests share it.
    const all = { ...process.env, PD_SKIP_BUILD: '1', ...env };
    const child = execFile(file, args, { cwd: ROOT, env: all }, (_, stdout, stderr) =>
      resolve({ code: child.exitCode ?? -1, stdout, stderr }),
    );
  });
}

async function bench(args: readonly string[], env: Record<string, string> = {}) {
  const ended = await run(process.execPath, [join(ROOT, 'bin/pd-bench'), ...args, '--json'], env);
  if (ended.stdout === '') throw new Error(ended.stderr);
  return { ...ended, result: JSON.parse(ended.stdout) as PartResult };
}

/** Rows that are not ok, whole: what one wants to see of a failure. */
const bad = ({ rows }: PartResult) => rows?.filter((row) => !row.ok);

describe.each(['host', 'cuda'] as const)('on %s', (device) => {
  const on = (args: readonly string[]) =>
    bench([...args, '--device', device, ...SMALL], device === 'cuda' ? standIns : {});

  test('transfer moves and checks every byte of every round, in all send types, and measures the ceilings', async () => {
    const { code, result, stderr } = await on([
      'transfer',
      '--tokens',
      '16,100',
      '--rounds',
      '3',
      '--warm-up',
      '1',
    ]);
    expect(result.error).toBeUndefined();
    const rows = result.transfer!.rows;
    expect(rows.map((row) => row.error).filter(Boolean)).toEqual([]);
    expect(rows).toHaveLength(3 * 2 * 2);
    for (const { source, tokens, bytes, checkedBytes, milliseconds } of rows) {
      const blocks = Math.ceil(tokens / 16);
      const block = 2 * 16 * 2 * 64 * 2;
      expect(bytes).toBe(4 * blocks * block);
      // paged: the whole cache is looked at, blocks between those of the request too
      expect(checkedBytes).toBe(2 * 4 * 4 * block * (source === 'paged' ? cacheBlocks(blocks) : blocks));
      expect(milliseconds).toHaveLength(3);
      expect(Math.min(...milliseconds)).toBeGreaterThan(0);
    }
    expect(result.transfer!.ceilingErrors).toEqual([]);
    expect(result.transfer!.ceilings).toHaveLength((device === 'host' ? 3 : 4) * 2);
    expect(result.transfer!.native!.map((row) => row.error).filter(Boolean)).toEqual([]);
    expect(result.clock.agrees).toBe(true);
    expect(stderr).toBe('');
    expect(code).toBe(0);
  });

  test('exchange: both ways at once, and crosswise between four', async () => {
    const small = ['--tensors', '40', '--tensor-bytes', '5000', '--crossing-bytes', '1MiB'];
    const { code, result } = await on(['exchange', ...small]);
    expect(bad(result)).toEqual([]);
    expect(result.rows).toHaveLength(1 + 3);
    expect(code).toBe(0);
  });

  test('faults: survivors say so and serve again', async () => {
    const quick = ['--tokens', '256', '--deadline', '3s', '--kernel', '300ms'];
    const { code, result } = await on(['faults', ...quick]);
    expect(bad(result)).toEqual([]);
    expect(result.rows).toHaveLength(device === 'host' ? 9 : 10);
    expect(code).toBe(0);
  });
});

test('interference measures a loop on both GPUs alone and beside transfers', async () => {
  const { result } = await bench(
    ['interference', ...SMALL, '--loop', 'memory', '--time', '200ms', '--tokens', '64'],
    standIns,
  );
  expect(result.rows).toHaveLength(2);
  for (const { data } of result.rows!) {
    expect(data!['before']).toBeGreaterThan(0);
    expect(data!['beside']).toBeGreaterThan(0);
    expect(data!['requests']).toBeGreaterThan(0);
  }
});

test('without GPUs it says what is missing, and where to go on without', async () => {
  const absent = Object.fromEntries(Object.keys(standIns).map((name) => [name, '/nonexistent/lib.so']));
  const { code, stderr } = await run(process.execPath, [join(ROOT, 'bin/pd-bench'), 'transfer'], absent);
  expect(code).toBe(1);
  expect(stderr).toContain('LIBRARY_NOT_FOUND');
  expect(stderr).toContain('--device host');
});

test('a server that does not answer is named where goodput was asked for, not only on its page', async () => {
  const url = `http://127.0.0.1:${await keptPort()}`;
  const args = ['goodput', '--url', url, '--out', await tempDir()];
  const { code, stderr } = await run(process.execPath, [join(ROOT, 'bin/pd-bench'), ...args]);
  expect(code).toBe(1);
  expect(stderr).toContain(`${url}: GET ${url}/v1/models: connect ECONNREFUSED`);
});

test.each([
  ['host', 'transfer,soak', ['soak', 'transfer']],
  ['cuda', 'exchange,device', ['exchange']],
])('gpu-results.sh on %s writes one report of all its parts', async (device, only, parts) => {
  const folder = await tempDir();
  const args = ['--device', device, '--small', '--only', only, '--out', folder];
  const env = device === 'cuda' ? standIns : {};
  const { code, stdout } = await run(join(ROOT, 'scripts/gpu-results.sh'), args, env);
  expect(stdout).toContain('all passed');
  expect(code).toBe(0);
  const [json] = readdirSync(folder).filter((file) => /^\d{4}-\d\d-\d\d-\S+-transfer\.json$/.test(file));
  const text = readFileSync(join(folder, json!), 'utf8');
  const report = JSON.parse(text) as Report;
  expect(report.parts.map(({ part }) => part).sort()).toEqual(parts);
  expect(report.steps.map(({ step, status }) => [step, status])).toEqual(
    only
      .split(',')
      .sort()
      .map((step) => [step, 0]),
  );
  expect(text).not.toContain(folder);
});
