/** hand-over-results.sh as people run it, in small: on the host, and on stand-in GPUs. */
import { execFile } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import type { BreakdownResult } from '../../bench/pair/breakdown.ts';
import type { PartResult } from '../../bench/transfer/result.ts';
import { standInEnvironment } from '../stand-ins/build.ts';
import { tempDir } from '../support/temp-dir.ts';

const script = fileURLToPath(new URL('../../scripts/hand-over-results.sh', import.meta.url));

interface Page {
  readonly transfer: PartResult;
  readonly breakdowns: readonly BreakdownResult[];
}

async function results(device: string, args: readonly string[], env: Readonly<Record<string, string>>) {
  const out = await tempDir();
  // The build is there: all tests share it.
  const all = { ...process.env, ...env, PD_SKIP_BUILD: '1' };
  const run = promisify(execFile)(script, ['--device', device, '--small', '--out', out, ...args], {
    env: all,
  });
  const { stdout } = await run.catch((error: { stdout: string; stderr: string }) => {
    throw new Error(error.stdout + error.stderr);
  });
  const name = readdirSync(out).find((file) => file.endsWith('-hand-over.json'))!;
  return { stdout, page: JSON.parse(readFileSync(join(out, name), 'utf8')) as Page };
}

test('on the host: every row moves the right bytes, and no stage of the way to a first token is missing', async () => {
  const { stdout, page } = await results('host', [], {});
  const { native = [], rows } = page.transfer.transfer!;
  // 16 and 256 tokens, kept and by layers; 4 requests at once
  expect(native.map(({ error }) => error).filter(Boolean)).toEqual([]);
  expect(native).toHaveLength(2 * 2 + 1);
  expect(rows).toHaveLength(2);
  const [demo] = page.breakdowns;
  expect(Object.keys(demo!.pair)).toEqual(
    expect.arrayContaining([
      ...['proxy prefill', 'proxy decode', 'producer submitted', 'producer core step', 'producer core bound'],
      ...['producer core landed', 'consumer core asked', 'consumer core loaded', 'consumer written'],
    ]),
  );
  expect(Object.keys(demo!.undivided)).toEqual(
    expect.arrayContaining(['proxy decode', 'consumer core drawn']),
  );
  expect(stdout).toContain('time to first token');
});

test('on stand-in GPUs: by direct and by nccl, also beside a consumer that decodes', async () => {
  const { page } = await results('cuda', ['--only', 'transfer'], standInEnvironment());
  const { native = [] } = page.transfer.transfer!;
  expect(native.map(({ error }) => error).filter(Boolean)).toEqual([]);
  expect(native.map(({ transport }) => transport)).toEqual([
    ...Array<string>(2 * 3 + 1).fill('direct'),
    ...Array<string>(2 * 3 + 1).fill('nccl'),
  ]);
});
