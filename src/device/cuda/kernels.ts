/**
 * Loading the kernels of one .cu file: the shipped machine code of this GPU, else the shipped PTX, which the driver compiles, else the
 * source compiled here by NVRTC. All before the first pair opens, since a load waits while any receive waits for its sender.
 */
import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Libcuda } from '../../../ffi/libcuda.ts';
import { loadNvrtc } from '../../../ffi/nvrtc.ts';
import type { CuFunctionHandle, CuModuleHandle } from '../../../ffi/pointers.ts';
import { PdError } from '../../errors.ts';
import { cachedKernel, kernelCacheFolder } from './kernel-cache.ts';

export interface KernelTarget {
  readonly driver: Libcuda;
  /** Compute capability of the current GPU. */
  readonly major: number;
  readonly minor: number;
}

/** Kernels of one source, by name. */
export interface KernelModule<Name extends string> {
  readonly functions: Readonly<Record<Name, CuFunctionHandle>>;
  /** Which image was loaded, for pd-doctor and logs. */
  readonly image: string;
}

interface Image {
  readonly label: string;
  readonly bytes: () => Uint8Array;
}

/** Architectures that scripts/build-kernels.sh ships machine code for. */
const SHIPPED = [
  [9, 0],
  [8, 9],
  [8, 0],
] as const;
/** The shipped PTX is of this capability; PTX of CUDA 13 needs a driver of CUDA 13 (580 or later). */
const PTX_SINCE = 8;

/** Throws CUDA_ERROR with every image that was tried. */
export function loadKernels<Name extends string>(
  source: string,
  names: readonly Name[],
  target: KernelTarget,
): KernelModule<Name> {
  const failures: string[] = [];
  for (const { label, bytes } of images(source, target)) {
    let module: CuModuleHandle;
    try {
      module = target.driver.moduleLoad(bytes(), `loading ${label}`);
    } catch (error) {
      failures.push(PdError.from(error).message);
      continue;
    }
    const functions = {} as Record<Name, CuFunctionHandle>;
    for (const name of names) functions[name] = target.driver.moduleFunction(module, name);
    return { functions, image: label };
  }
  throw new PdError(
    'CUDA_ERROR',
    `no image of the kernels ${source} loads on this GPU: ${failures.join('; ')}`,
    {
      kernels: source,
    },
  );
}

function* images(source: string, target: KernelTarget): Generator<Image> {
  const folder = kernelFolder();
  const arch = shippedArch(target.major, target.minor);
  // PD_KERNELS leaves one kind of image: a way round a broken one, and how tests reach each
  const only = process.env['PD_KERNELS'];
  const wants = (kind: string) => !only || only === kind;
  if (arch !== undefined && wants('cubin')) {
    const label = `${source}.${arch}.cubin`;
    yield { label, bytes: () => readFileSync(join(folder, 'bin', label)) };
  }
  if (target.major >= PTX_SINCE && wants('ptx')) {
    const label = `${source}.ptx`;
    // the driver reads PTX up to a zero byte
    yield { label, bytes: () => Buffer.concat([readFileSync(join(folder, 'bin', label)), Buffer.alloc(1)]) };
  }
  if (wants('nvrtc')) {
    yield {
      label: `${source}.cu by NVRTC`,
      bytes: () => compileKernels(withIncludes(join(folder, `${source}.cu`)), source, target),
    };
  }
}

/** Machine code runs on the same major capability with the same or a higher minor one. */
export function shippedArch(major: number, minor: number): string | undefined {
  const found = SHIPPED.find(
    ([shippedMajor, shippedMinor]) => shippedMajor === major && shippedMinor <= minor,
  );
  return found && `sm_${found[0]}${found[1]}`;
}

/** NVRTC is given one text: what a source includes from its own folder is put in place. */
function withIncludes(file: string): string {
  return readFileSync(file, 'utf8').replace(/^#include "([^"]+)"$/gm, (_, name: string) =>
    readFileSync(join(dirname(file), name), 'utf8').replace('#pragma once', ''),
  );
}

function compileKernels(text: string, name: string, target: KernelTarget): Uint8Array {
  const nvrtc = loadNvrtc(Math.trunc(target.driver.driverVersion() / 1000));
  const arch = `sm_${target.major}${target.minor}`;
  const options = [`--gpu-architecture=${arch}`, '--std=c++17'];
  const key = { arch, options, compiler: nvrtc.version(), source: text };
  return cachedKernel(kernelCacheFolder(), key, () => nvrtc.compile(`${name}.cu`, text, options));
}

/** `kernels/` of this installation, beside `src/` or beside `dist/`. */
function kernelFolder(): string {
  for (let at = dirname(fileURLToPath(import.meta.url)); ; at = dirname(at)) {
    const folder = join(at, 'kernels');
    if (existsSync(join(folder, 'manifest.json'))) return folder;
    if (at === dirname(at))
      throw new PdError('DEVICE_UNAVAILABLE', 'the folder kernels/ of this installation is missing');
  }
}
