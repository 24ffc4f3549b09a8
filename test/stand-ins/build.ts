/** Builds the stand-in library with gcc, once per version of its sources, and names it to the product as all four libraries. */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync } from 'node:fs';
import { tmpdir, userInfo } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { dlopen } from '../../ffi/native.ts';

const FOLDER = dirname(fileURLToPath(import.meta.url));

/** Path of the built library. */
export function buildStandIns(): string {
  const sources = readdirSync(FOLDER)
    .filter((name) => /\.[ch]$/.test(name))
    .sort();
  const hash = createHash('sha256');
  for (const name of sources) hash.update(readFileSync(join(FOLDER, name)));
  const folder = join(tmpdir(), `pd-stand-ins-${userInfo().uid}`);
  const library = join(folder, `libpdstandin-${hash.digest('hex').slice(0, 16)}.so`);
  if (existsSync(library)) return library;
  mkdirSync(folder, { recursive: true });
  const aside = `${library}.${process.pid}`;
  const files = sources.filter((name) => name.endsWith('.c')).map((name) => join(FOLDER, name));
  const flags = [
    '-std=gnu11',
    '-O2',
    '-g',
    '-Wall',
    '-Wextra',
    '-Werror',
    '-shared',
    '-fPIC',
    '-fvisibility=hidden',
  ];
  execFileSync('gcc', [...flags, '-pthread', '-o', aside, ...files, '-lm'], {
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  renameSync(aside, library);
  return library;
}

/** Environment with which a process takes the stand-ins for CUDA and NCCL. */
export function standInEnvironment(library = buildStandIns()): Record<string, string> {
  return {
    PD_CUDA_LIB: library,
    PD_CUDART_LIB: library,
    PD_NCCL_LIB: library,
    PD_NVRTC_LIB: library,
    PD_CUBLAS_LIB: library,
  };
}

export interface StandIns {
  /** Sets the faults of this process, see faults.c; an empty string takes them back. */
  faults(text: string): void;
  /** How many calls of this process hang now. */
  hanging(): number;
}

/** Puts the stand-ins under this process; before anything of CUDA is loaded. */
export function useStandIns(): StandIns {
  const library = buildStandIns();
  Object.assign(process.env, standInEnvironment(library));
  const { handle } = dlopen(library);
  const set = handle.func('pd_standin_faults', 'void', ['const char *']);
  const hanging = handle.func('pd_standin_hanging', 'int', []);
  return { faults: (text) => set(text), hanging: () => hanging() };
}
