/**
 * The kernels of one .cu file: a table of what it declares, launches that the table types, and loading.
 *
 * Loaded is the shipped machine code of this GPU, else the shipped PTX, which the driver compiles, else the source compiled here by NVRTC.
 * All before the first pair opens, since a load waits while any receive waits for its sender.
 */
import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { Libcuda } from '../../../ffi/libcuda.ts';
import { allocateNative, freeNative, nativeView } from '../../../ffi/native.ts';
import { loadNvrtc } from '../../../ffi/nvrtc.ts';
import type {
  CudaStreamHandle,
  CuFunctionHandle,
  CuModuleHandle,
  DevicePointer,
  NativePointer,
} from '../../../ffi/pointers.ts';
import { PdError } from '../../errors.ts';
import { installedFile } from '../../version.ts';
import { cachedKernel, kernelCacheFolder } from './kernel-cache.ts';

/**
 * Kernels by name, with their parameters, both as the source declares them, which loading checks. A name that a macro makes is the
 * macro's, `rms_norm_##T`; a pointer that may be null ends in `?`.
 */
export interface KernelTable {
  /** Under kernels/, without .cu. */
  readonly source: string;
  readonly kernels: Readonly<Record<string, string>>;
}

type Trim<Text extends string> = Text extends ` ${infer Rest}` | `\n${infer Rest}` ? Trim<Rest> : Text;

/** One parameter: its name and what is passed for it. Another C type than these leaves no call that compiles. */
type Argument<Declared extends string> = Declared extends `${string}*${infer Name}?`
  ? { readonly [N in Name]: DevicePointer | undefined }
  : Declared extends `${string}*${infer Name}`
    ? { readonly [N in Name]: DevicePointer }
    : Declared extends `${'int' | 'float'} ${infer Name}`
      ? { readonly [N in Name]: number }
      : // a struct by value: the address of its bytes
        Declared extends `const __grid_constant__ ${string} ${infer Name}`
        ? { readonly [N in Name]: NativePointer }
        : never;

/** What a kernel with these parameters is launched with, by name. */
type Arguments<Declared extends string> = Declared extends `${infer First},${infer Rest}`
  ? Argument<Trim<First>> & Arguments<Rest>
  : Argument<Trim<Declared>>;

/** The parts of a kernel's name that a macro fills in: `T` and `D` of `attention_prefill_##T##_##D`. */
type MacroParts<Name extends string> = Name extends `${string}##${infer Part}##${infer Rest}`
  ? Part | MacroParts<Rest>
  : Name extends `${string}##${infer Part}`
    ? Part
    : never;
type Variant<Name extends string> = { readonly [Part in MacroParts<Name>]: string | number };

export interface KernelTarget {
  readonly driver: Libcuda;
  /** Compute capability of the current GPU. */
  readonly major: number;
  readonly minor: number;
  /** This thread's, for every kernel. */
  readonly slots: ArgumentSlots;
}

/** Threads of a block, and dynamic shared memory in bytes. */
export interface BlockShape {
  readonly threads: number;
  readonly sharedBytes?: number;
}

/** What a launch may take without being allowed to. */
const SHARED_BYTES_UNASKED = 48 * 2 ** 10;

interface KernelModule<Table extends KernelTable> {
  /** Which image was loaded, for pd-doctor and logs. */
  readonly image: string;
  /** Throws CUDA_ERROR where the image has no such kernel, or the GPU not as much shared memory. */
  kernel<Name extends keyof Table['kernels'] & string>(
    name: Name,
    variant: Variant<Name>,
    block: BlockShape,
  ): Kernel<Table['kernels'][Name]>;
}

/** More than any kernel of ours takes. */
const MAX_ARGUMENTS = 24;

/** Native memory for the arguments of a launch, 8 bytes each. The driver reads them before a launch returns, so all kernels share it. */
export class ArgumentSlots {
  readonly addresses: readonly bigint[];
  readonly words: BigUint64Array;
  /** A number lies at the beginning of its slot: at twice the slot's index. */
  readonly ints: Int32Array;
  readonly floats: Float32Array;
  readonly #memory = allocateNative(8 * MAX_ARGUMENTS);

  constructor() {
    const { buffer, byteOffset } = nativeView(this.#memory, 8 * MAX_ARGUMENTS);
    this.words = new BigUint64Array(buffer, byteOffset, MAX_ARGUMENTS);
    this.ints = new Int32Array(buffer, byteOffset, 2 * MAX_ARGUMENTS);
    this.floats = new Float32Array(buffer, byteOffset, 2 * MAX_ARGUMENTS);
    this.addresses = Array.from({ length: MAX_ARGUMENTS }, (_, i) => this.#memory + BigInt(8 * i));
  }

  /** Once. No kernel may be launched after it. */
  dispose(): void {
    freeNative(this.#memory);
  }
}

interface Parameter {
  readonly name: string;
  readonly kind: 'pointer' | 'int' | 'float' | 'struct';
}

/** One kernel of a loaded image. */
class Kernel<Declared extends string> {
  readonly #target: KernelTarget;
  readonly #fn: CuFunctionHandle;
  readonly #parameters: readonly Parameter[];
  readonly #addresses: BigUint64Array;
  readonly #shape: { blocks: number; readonly threads: number; readonly sharedBytes: number };

  constructor(target: KernelTarget, fn: CuFunctionHandle, declared: Declared, block: BlockShape) {
    this.#target = target;
    this.#fn = fn;
    this.#parameters = parametersOf(declared).map(parameterOf);
    this.#addresses = BigUint64Array.from(this.#parameters, (_, i) => target.slots.addresses[i]!);
    this.#shape = { blocks: 0, threads: block.threads, sharedBytes: block.sharedBytes ?? 0 };
  }

  /** Enqueues `blocks` blocks. Hundreds of these make a step: nothing is allocated here. Throws CUDA_ERROR. */
  launch(stream: CudaStreamHandle, blocks: number, args: Arguments<Declared>): void {
    const { driver, slots } = this.#target;
    const values = args as Readonly<Record<string, bigint | number | undefined>>;
    const parameters = this.#parameters;
    for (let i = 0; i < parameters.length; i++) {
      const { name, kind } = parameters[i]!;
      const value = values[name];
      if (kind === 'pointer') slots.words[i] = (value as bigint | undefined) ?? 0n;
      else if (kind === 'int') slots.ints[2 * i] = value as number;
      else if (kind === 'float') slots.floats[2 * i] = value as number;
      else this.#addresses[i] = value as bigint;
    }
    this.#shape.blocks = blocks;
    driver.launch(this.#fn, this.#shape, stream, this.#addresses);
  }
}

function parametersOf(declared: string): string[] {
  return declared.split(/,\s*/);
}

function parameterOf(declared: string): Parameter {
  const [, type = '', name = ''] = /^(.*?)(\w+)\??$/.exec(declared) ?? [];
  if (type.endsWith('*')) return { name, kind: 'pointer' };
  if (type === 'int ' || type === 'float ') return { name, kind: type === 'int ' ? 'int' : 'float' };
  return { name, kind: 'struct' };
}

/** Throws INTERNAL, naming kernel and parameter, where `table` is not what the sources beside this program declare. */
export function checkKernels({ source, kernels }: KernelTable): void {
  const text = readFileSync(join(kernelFolder(), 'manifest.json'), 'utf8');
  // written by scripts/build-kernels.sh
  const manifest = JSON.parse(text) as {
    kernels: Record<string, { parameters?: Record<string, string> } | undefined>;
  };
  const sources = manifest.kernels[source]?.parameters ?? {};
  for (const [kernel, declared] of Object.entries(kernels)) {
    const here = parametersOf(declared).map((parameter) => parameter.replace('?', ''));
    const there = parametersOf(sources[kernel] ?? '');
    for (let i = 0; i < Math.max(here.length, there.length); i++) {
      if (here[i] === there[i]) continue;
      throw new PdError(
        'INTERNAL',
        `kernels/${source}.cu does not fit this program: parameter ${i + 1} of ${kernel} is ${quoted(there[i])} there and ${quoted(here[i])} here; ` +
          'install the program and its folder kernels/ from one release',
        { kernels: source, kernel, parameter: here[i] ?? there[i] },
      );
    }
  }
}

function quoted(declared: string | undefined): string {
  return declared ? `"${declared}"` : 'none';
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

/** Throws INTERNAL where the table does not fit the source, and CUDA_ERROR with every image that was tried. */
export function loadKernels<Table extends KernelTable>(
  table: Table,
  target: KernelTarget,
): KernelModule<Table> {
  checkKernels(table);
  const { source, kernels } = table;
  const { driver } = target;
  const failures: string[] = [];
  for (const { label, bytes } of images(source, target)) {
    let module: CuModuleHandle;
    try {
      module = driver.moduleLoad(bytes(), `loading ${label}`);
    } catch (error) {
      failures.push(PdError.from(error).message);
      continue;
    }
    return {
      image: label,
      kernel: (name, variant, block) => {
        const parts: Readonly<Record<string, string | number>> = variant;
        const exported = name
          .split('##')
          .map((part, i) => (i % 2 === 0 ? part : parts[part]))
          .join('');
        const fn = driver.moduleFunction(module, exported);
        const { sharedBytes = 0 } = block;
        if (sharedBytes > SHARED_BYTES_UNASKED) driver.allowSharedBytes(fn, sharedBytes, exported);
        return new Kernel(target, fn, kernels[name] as Table['kernels'][typeof name], block);
      },
    };
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

/** `kernels/` of this installation. */
function kernelFolder(): string {
  const manifest = installedFile('kernels/manifest.json');
  if (manifest !== undefined) return dirname(manifest);
  throw new PdError('DEVICE_UNAVAILABLE', 'the folder kernels/ of this installation is missing');
}
