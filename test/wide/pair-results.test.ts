/** pair-results.sh as people run it, with few and short requests: on the host, and computing on stand-in GPUs. */
import { execFile } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { type PairResult, problemsOf } from '../../bench/pair/result.ts';
import { standInEnvironment } from '../stand-ins/build.ts';

const script = fileURLToPath(new URL('../../scripts/pair-results.sh', import.meta.url));

let out: string;
beforeEach(() => {
  out = mkdtempSync(join(tmpdir(), 'pd-pair-'));
});
afterEach(() => rmSync(out, { recursive: true, force: true }));

test.each([
  ['host', 'native,GET', {}],
  ['cuda', 'native', standInEnvironment()],
] as const)(
  '%s, %s: a pair says what an undivided worker says, in chunks, with cached prefixes and after preemption',
  async (device, sendTypes, more) => {
    // The build is there: all tests share it.
    const env = { ...process.env, ...more, PD_SKIP_BUILD: '1' };
    const args = ['--device', device, '--only', 'demo', '--small', '--send-types', sendTypes, '--out', out];
    await promisify(execFile)(script, args, { env }).catch(() => {}); // the result says more
    const read = (ending: string) =>
      readFileSync(join(out, readdirSync(out).find((name) => name.endsWith(`-pair${ending}`))!), 'utf8');
    const { results } = JSON.parse(read('.json')) as { results: PairResult[] };
    expect(results.flatMap(problemsOf)).toEqual([]);
    const [demo] = results;
    const types = sendTypes.split(',');
    const modes = device === 'cuda' ? 2 : 1;
    expect(demo!.checks).toHaveLength(modes * types.length * 5);
    expect(demo!.times.map(({ sendType }) => sendType)).toEqual(types);
    for (const check of demo!.checks.filter(({ mode }) => mode === 'batch-invariant')) {
      expect(check.same).toBe(check.requests);
    }
    expect(read('.md')).toContain('All passed.');
  },
);
