import { execFileSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { cachedKernel } from '../../../src/device/cuda/kernel-cache.ts';
import { shippedArch } from '../../../src/device/cuda/kernels.ts';

test('the shipped kernels are those of their sources', () => {
  expect(execFileSync('scripts/build-kernels.sh', ['--check'], { encoding: 'utf8' })).toContain('hashes fit');
});

test.each([
  [8, 0, 'sm_80'],
  [8, 6, 'sm_80'],
  [8, 9, 'sm_89'],
  [9, 0, 'sm_90'],
  [10, 0, undefined],
  [7, 5, undefined],
])('capability %i.%i runs %s', (major, minor, arch) => {
  expect(shippedArch(major, minor)).toBe(arch);
});

test('a kernel is compiled once per architecture, options, compiler and source', () => {
  const folder = mkdtempSync(join(tmpdir(), 'pd-kernels-'));
  try {
    let compiled = 0;
    const key = { arch: 'sm_90', options: ['-a'], compiler: '13.0', source: 'x' };
    const get = (change: Partial<typeof key>) =>
      cachedKernel(folder, { ...key, ...change }, () => Uint8Array.of(++compiled));
    expect([...get({})]).toEqual([1]);
    expect([...get({})]).toEqual([1]);
    for (const change of [{ arch: 'sm_89' }, { options: ['-', 'a'] }, { compiler: '13.1' }, { source: 'y' }])
      get(change);
    expect(compiled).toBe(5);
    expect(readdirSync(folder).every((name) => name.endsWith('.cubin'))).toBe(true);
    writeFileSync(join(folder, 'file'), '');
    expect([...cachedKernel(join(folder, 'file', 'x'), key, () => Uint8Array.of(9))]).toEqual([9]);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
