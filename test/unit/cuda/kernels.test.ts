import { execFileSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, expect, test, vi } from 'vitest';
import type { Libcuda } from '../../../ffi/libcuda.ts';
import { nativeView } from '../../../ffi/native.ts';
import type { CudaStreamHandle, CuFunctionHandle, DevicePointer } from '../../../ffi/pointers.ts';
import { cachedKernel } from '../../../src/device/cuda/kernel-cache.ts';
import {
  ArgumentSlots,
  checkKernels,
  type KernelTable,
  type KernelTarget,
  loadKernels,
  shippedArch,
} from '../../../src/device/cuda/kernels.ts';
import { COPY_KERNELS, PARAMETER_BYTES } from '../../../src/device/cuda/paged-copy.ts';
import { WRITE_KERNELS, WRITE_PARAMETER_BYTES } from '../../../src/device/cuda/paged-write.ts';
import {
  ATTENTION_DECODE,
  ATTENTION_PREFILL,
  ELEMENTWISE,
  GEMM,
  GEMV,
  HEAD_DIMS,
  ModelKernels,
  SAMPLE,
} from '../../../src/model/cuda/kernels.ts';

const TABLES: readonly KernelTable[] = [
  COPY_KERNELS,
  WRITE_KERNELS,
  ATTENTION_DECODE,
  ATTENTION_PREFILL,
  ELEMENTWISE,
  GEMM,
  GEMV,
  SAMPLE,
];
const pointer = (value: number) => BigInt(value) as DevicePointer;

afterEach(() => vi.unstubAllEnvs());

test('the shipped kernels and the parameters in the manifest are those of their sources', () => {
  expect(execFileSync('scripts/build-kernels.sh', ['--check'], { encoding: 'utf8' })).toContain(
    'manifest matches',
  );
});

test('every kernel of every source has its row in a table, with the parameters of the source', () => {
  const { kernels } = JSON.parse(readFileSync('kernels/manifest.json', 'utf8'));
  const names = (of: Readonly<Record<string, unknown>>) => Object.keys(of).sort();
  expect(TABLES.map(({ source }) => source).sort()).toEqual(names(kernels));
  for (const table of TABLES) {
    checkKernels(table);
    expect(names(table.kernels)).toEqual(names(kernels[table.source].parameters));
  }
});

test.each([
  ['other names', 'const float *logits, int *tokens, int words', 'parameter 3 of argmax', 'int words'],
  ['another order', 'int *tokens, const float *logits, int vocab', 'parameter 1 of argmax', 'int *tokens'],
  ['another type', 'const float *logits, int *tokens, float vocab', 'parameter 3 of argmax', 'float vocab'],
  ['one too few', 'const float *logits, int *tokens', 'parameter 3 of argmax', 'int vocab'],
  ['one too many', 'const float *logits, int *tokens, int vocab, int x', 'parameter 4 of argmax', 'int x'],
])('a table with %s does not load', (_, argmax, message, parameter) => {
  expect(() => checkKernels({ source: 'model/sample', kernels: { argmax } })).toThrow(
    expect.objectContaining({
      code: 'INTERNAL',
      message: expect.stringContaining(message),
      context: { kernels: 'model/sample', kernel: 'argmax', parameter },
    }),
  );
});

test('a kernel that no source has does not load', () => {
  const table = { source: 'model/sample', kernels: { sort: 'int *tokens' } };
  expect(() => checkKernels(table)).toThrow(/parameter 1 of sort is none there and "int \*tokens" here/);
});

/** Exported names and the PTX types of their parameters: `u64`, `u32`, `f32`, `b8[bytes]`. */
function entries(source: string): Map<string, string[]> {
  const text = readFileSync(`kernels/bin/${source}.ptx`, 'utf8');
  return new Map(
    [...text.matchAll(/\.entry (\w+)\(([^)]*)\)/g)].map(([, name, parameters]) => [
      name!,
      [...parameters!.matchAll(/\.param (?:\.align \d+ )?\.(\w+) (?:\.ptr[^,]* )?\w+?(\[\d+\])?,?$/gm)].map(
        ([, type, size = '']) => `${type}${size}`,
      ),
    ]),
  );
}

test('the shipped PTX takes the parameters of the tables, in their order', () => {
  const typeOf = (declared: string) =>
    declared.includes('*')
      ? 'u64'
      : declared.includes('PagedCopy')
        ? `b8[${PARAMETER_BYTES}]`
        : declared.includes('PagedWrite')
          ? `b8[${WRITE_PARAMETER_BYTES}]`
          : declared.startsWith('float')
            ? 'f32'
            : 'u32';
  for (const { source, kernels } of TABLES) {
    const rows = Object.entries(kernels).map(([name, declared]) => ({
      pattern: new RegExp(`^${name.replace(/##\w+?##|##\w+$/g, '[A-Za-z0-9]+')}$`),
      types: declared.split(/,\s*/).map(typeOf),
    }));
    const exported = [...entries(source)];
    for (const [name, types] of exported) {
      expect([name, rows.filter(({ pattern }) => pattern.test(name)).map((row) => row.types)]).toEqual([
        name,
        [types],
      ]);
    }
    for (const { pattern } of rows) expect(exported.some(([name]) => pattern.test(name))).toBe(true);
  }
});

/** A driver that notes what is asked of it. */
function fakeTarget() {
  const names: string[] = [];
  const launches: { readonly params: BigUint64Array; readonly blocks: number; readonly threads: number }[] =
    [];
  const driver = {
    moduleLoad: () => 1n,
    moduleFunction: (_: bigint, name: string) => {
      names.push(name);
      return 2n as CuFunctionHandle;
    },
    allowSharedBytes: () => {},
    launch: (
      _: CuFunctionHandle,
      { blocks, threads }: { blocks: number; threads: number },
      __: CudaStreamHandle,
      params: BigUint64Array,
    ) => launches.push({ params, blocks, threads }),
  } as unknown as Libcuda;
  const target: KernelTarget = { driver, major: 9, minor: 0, slots: new ArgumentSlots() };
  return { target, names, launches };
}

test('a worker asks the images for kernels that they have, whatever its model', () => {
  const exported = TABLES.flatMap(({ source }) => [...entries(source).keys()]);
  const asked = new Set<string>();
  for (const type of ['bfloat16', 'float16'] as const) {
    for (const headDim of HEAD_DIMS) {
      for (const heads of [1, 2, 3, 4, 8, 16]) {
        const { target, names } = fakeTarget();
        const shape = { type, heads, kvHeads: 1, headDim, blockSize: 16, eps: 1e-5 };
        const angles = { cosine: pointer(1), sine: pointer(2) };
        new ModelKernels(target, 3n as CudaStreamHandle, shape, angles);
        for (const name of names) asked.add(name);
        target.slots.dispose();
      }
    }
  }
  expect([...asked].filter((name) => !exported.includes(name))).toEqual([]);
  const model = exported.filter((name) => !(name in COPY_KERNELS.kernels || name in WRITE_KERNELS.kernels));
  expect(model.filter((name) => !asked.has(name))).toEqual([]);
});

test('a launch puts each argument where its parameter stands, whatever the order of the call', () => {
  const { target, launches } = fakeTarget();
  const norm = loadKernels(ELEMENTWISE, target).kernel('rms_norm_##T', { T: 'bf16' }, { threads: 256 });
  const args = { out: pointer(4), x: pointer(2 ** 40), weight: pointer(3), eps: 0.5, hidden: -7 };
  norm.launch(5n as CudaStreamHandle, 6, { ...args, chosen: undefined });
  const { params, blocks, threads } = launches[0]!;
  expect([blocks, threads, params.length]).toEqual([6, 256, 6]);
  const slot = (i: number) => new DataView(nativeView(params[i]!, 8).slice().buffer);
  expect([0, 1, 2, 3].map((i) => slot(i).getBigUint64(0, true))).toEqual([2n ** 40n, 0n, 3n, 4n]);
  expect([slot(4).getInt32(0, true), slot(5).getFloat32(0, true)]).toEqual([-7, 0.5]);
  // what a launch lacks or has too much of, and the same pointers under other names, no compiler lets pass
  // @ts-expect-error chosen is missing
  const missing: Parameters<typeof norm.launch>[2] = args;
  // @ts-expect-error there is no such parameter
  const wrong: Parameters<typeof norm.launch>[2] = { ...args, chosen: undefined, rows: 1 };
  // @ts-expect-error a weight is always given
  const absent: Parameters<typeof norm.launch>[2] = { ...args, chosen: undefined, weight: undefined };
  expect([missing, wrong, absent]).toHaveLength(3);
  target.slots.dispose();
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
