import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, expect, test, vi } from 'vitest';
import { candidates, explicitCandidate } from '../../../ffi/find.ts';
import { loadLibrary } from '../../../ffi/load.ts';
import { PdError } from '../../../src/errors.ts';

const folder = mkdtempSync(join(tmpdir(), 'pd-find-'));
afterEach(() => {
  vi.unstubAllEnvs();
  rmSync(folder, { recursive: true, force: true });
});

test("our variable names the file before vLLM's", () => {
  const env = { PD_NCCL_LIB: '/a/libnccl.so.2', VLLM_NCCL_SO_PATH: '/b/libnccl.so.2' };
  expect(explicitCandidate('nccl', env)).toEqual({ path: '/a/libnccl.so.2', source: 'PD_NCCL_LIB' });
  expect(explicitCandidate('nccl', { VLLM_NCCL_SO_PATH: '/b' })?.path).toBe('/b');
  expect(explicitCandidate('nccl', {})).toBeUndefined();
});

test("the loader's path comes before CUDA's places, and those before pip's packages", () => {
  const site = join(folder, 'lib/python3.12/site-packages/nvidia/nccl/lib');
  mkdirSync(site, { recursive: true });
  writeFileSync(join(site, 'libnccl.so.2'), '');
  mkdirSync(join(folder, 'lib64'));
  vi.stubEnv('VIRTUAL_ENV', folder);
  vi.stubEnv('CUDA_HOME', folder);
  const found = candidates('nccl').map(({ path }) => path);
  expect(found[0]).toBe('libnccl.so.2');
  const places = [join(folder, 'lib64/libnccl.so.2'), join(site, 'libnccl.so.2')].map((path) =>
    found.indexOf(path),
  );
  expect(places[0]).toBeGreaterThan(0);
  expect(places[1]).toBeGreaterThan(places[0]!);
});

test('a CUDA 13 runtime is not tried on a CUDA 12 driver', () => {
  const names = (major: number) => candidates('cudart', major).map(({ path }) => path.replace(/.*\//, ''));
  expect(new Set(names(12))).toEqual(new Set(['libcudart.so.12']));
  expect(names(13)[0]).toBe('libcudart.so.13');
  expect(names(13)).toContain('libcudart.so.12');
});

test('a failure is a PdError that lists what was tried and what to install', () => {
  vi.stubEnv('PD_NVRTC_LIB', undefined);
  vi.stubEnv('CUDA_HOME', join(folder, 'none'));
  expect(() => loadLibrary('cublasLt', 12)).toThrow(PdError);
  expect(() => loadLibrary('cublasLt', 12)).toThrow(
    expect.objectContaining({
      code: 'LIBRARY_NOT_FOUND',
      message: expect.stringMatching(
        /libcublasLt\.so\.12 \(the loader's path\).*pip install nvidia-cublas.*PD_CUBLASLT_LIB/,
      ),
    }),
  );
});

test('a file that is named but does not load is an error, not a reason to take another one', () => {
  vi.stubEnv('PD_NCCL_LIB', join(folder, 'libnccl.so.2'));
  expect(() => loadLibrary('nccl')).toThrow(
    expect.objectContaining({
      message: expect.stringMatching(
        /tried [^;]*libnccl\.so\.2 \(PD_NCCL_LIB\): [^;]*No such file[^;]*\. To fix it/,
      ),
    }),
  );
});
