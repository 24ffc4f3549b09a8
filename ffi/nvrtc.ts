/** NVRTC, CUDA's compiler as a library: CUDA C++ source to machine code for one GPU architecture. */

import { nativeError, statusError } from './errors.ts';
import { loadLibrary } from './load.ts';
import { type Bound, bind, type NativeLibrary, row } from './native.ts';

type Out = BigUint64Array | Int32Array | Uint8Array;

const NVRTC = {
  // nvrtcResult nvrtcVersion(int *major, int *minor)
  nvrtcVersion: row<[major: Out, minor: Out]>('int(void *, void *)'),
  // nvrtcResult nvrtcCreateProgram(nvrtcProgram *prog, const char *src, const char *name, int numHeaders,
  //                                const char *const *headers, const char *const *includeNames)
  nvrtcCreateProgram: row<
    [program: Out, source: string, name: string, headers: number, bodies: null, names: null]
  >('int(void *, const char *, const char *, int, void *, void *)'),
  // nvrtcResult nvrtcCompileProgram(nvrtcProgram prog, int numOptions, const char *const *options)
  nvrtcCompileProgram: row<[program: bigint, count: number, options: readonly string[]]>(
    'int(void *, int, const char **)',
  ),
  // nvrtcResult nvrtcGetCUBINSize(nvrtcProgram prog, size_t *cubinSizeRet)
  nvrtcGetCUBINSize: row<[program: bigint, size: Out]>('int(void *, void *)'),
  // nvrtcResult nvrtcGetCUBIN(nvrtcProgram prog, char *cubin)
  nvrtcGetCUBIN: row<[program: bigint, cubin: Out]>('int(void *, void *)'),
  // nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram prog, size_t *logSizeRet)
  nvrtcGetProgramLogSize: row<[program: bigint, size: Out]>('int(void *, void *)'),
  // nvrtcResult nvrtcGetProgramLog(nvrtcProgram prog, char *log)
  nvrtcGetProgramLog: row<[program: bigint, log: Out]>('int(void *, void *)'),
  // nvrtcResult nvrtcDestroyProgram(nvrtcProgram *prog)
  nvrtcDestroyProgram: row<[program: Out]>('int(void *)'),
  // const char *nvrtcGetErrorString(nvrtcResult result)
  nvrtcGetErrorString: row<[result: number], string | null>('const char *(int)'),
} as const;

const SUCCESS = 0;

export class Nvrtc {
  readonly library: NativeLibrary;
  readonly #call: Bound<typeof NVRTC>;
  readonly #size = new BigUint64Array(1);

  constructor(library: NativeLibrary) {
    this.library = library;
    this.#call = bind(library, NVRTC);
  }

  /** Such as `13.0`. */
  version(): string {
    const major = new Int32Array(1);
    const minor = new Int32Array(1);
    this.#check(this.#call.nvrtcVersion(major, minor), 'nvrtcVersion');
    return `${major[0]}.${minor[0]}`;
  }

  /** Machine code (cubin). Throws CUDA_ERROR with the options, the compiler's log and the numbered source. */
  compile(name: string, source: string, options: readonly string[]): Uint8Array {
    const program = new BigUint64Array(1);
    this.#check(this.#call.nvrtcCreateProgram(program, source, name, 0, null, null), 'nvrtcCreateProgram');
    try {
      const handle = program[0]!;
      const status = this.#call.nvrtcCompileProgram(handle, options.length, options);
      if (status !== SUCCESS) throw this.#compileError(handle, name, source, options, status);
      this.#check(this.#call.nvrtcGetCUBINSize(handle, this.#size), 'nvrtcGetCUBINSize');
      const cubin = new Uint8Array(Number(this.#size[0]));
      this.#check(this.#call.nvrtcGetCUBIN(handle, cubin), 'nvrtcGetCUBIN');
      return cubin;
    } finally {
      this.#call.nvrtcDestroyProgram(program);
    }
  }

  #compileError(
    program: bigint,
    name: string,
    source: string,
    options: readonly string[],
    status: number,
  ): Error {
    const log = this.#log(program);
    const numbered = source
      .split('\n')
      .map((line, index) => `${String(index + 1).padStart(4)}  ${line}`)
      .join('\n');
    return nativeError(
      'CUDA_ERROR',
      `compiling ${name} failed with ${status}: ${this.#call.nvrtcGetErrorString(status) ?? 'unknown'}\noptions: ${options.join(' ')}\n${log}\n${numbered}`,
      { call: 'nvrtcCompileProgram', status },
    );
  }

  #log(program: bigint): string {
    if (this.#call.nvrtcGetProgramLogSize(program, this.#size) !== SUCCESS) return '(no log)';
    const log = new Uint8Array(Math.max(1, Number(this.#size[0])));
    if (this.#call.nvrtcGetProgramLog(program, log) !== SUCCESS) return '(no log)';
    return Buffer.from(log).toString('utf8').replace(/\0+$/, '');
  }

  #check(status: number, call: string): void {
    if (status === SUCCESS) return;
    throw statusError('CUDA_ERROR', call, status, this.#call.nvrtcGetErrorString(status) ?? 'unknown');
  }
}

let compiler: Nvrtc | undefined;

/** This thread's compiler, of a version that the driver supports. Throws LIBRARY_NOT_FOUND. */
export function loadNvrtc(cudaMajor: number): Nvrtc {
  compiler ??= new Nvrtc(loadLibrary('nvrtc', cudaMajor));
  return compiler;
}
