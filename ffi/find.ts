/** Where the native libraries may be: names for the loader, in the order in which they are tried. */
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';

export type LibraryName = 'cuda' | 'cudart' | 'nccl' | 'nvrtc' | 'cublas' | 'cublasLt';

interface LibrarySpec {
  /** For messages. */
  readonly title: string;
  /** Environment variables that name the file, ours first; command line flags set ours. */
  readonly env: readonly string[];
  /** In order of preference. */
  readonly sonames: readonly string[];
  /** Directories inside pip's `nvidia` package. */
  readonly pip: readonly string[];
  readonly install: string;
}

export const LIBRARIES: Readonly<Record<LibraryName, LibrarySpec>> = {
  cuda: {
    title: 'the CUDA driver library (libcuda)',
    env: ['PD_CUDA_LIB'],
    sonames: ['libcuda.so.1'],
    pip: [],
    install: 'install the NVIDIA driver (or start the container with --gpus all)',
  },
  cudart: {
    title: 'the CUDA runtime (libcudart)',
    env: ['PD_CUDART_LIB'],
    sonames: ['libcudart.so.13', 'libcudart.so.12'],
    pip: ['cu13', 'cuda_runtime'],
    install: 'install the CUDA 12 or 13 runtime, for example: pip install nvidia-cuda-runtime',
  },
  nccl: {
    title: 'NCCL (libnccl)',
    env: ['PD_NCCL_LIB', 'VLLM_NCCL_SO_PATH'],
    sonames: ['libnccl.so.2'],
    pip: ['nccl'],
    install:
      'install NCCL 2.27 or later (libnccl2, or pip install nvidia-nccl-cu13), the same version as on the peers',
  },
  nvrtc: {
    title: 'the CUDA runtime compiler (libnvrtc)',
    env: ['PD_NVRTC_LIB'],
    sonames: ['libnvrtc.so.13', 'libnvrtc.so.12'],
    pip: ['cu13', 'cuda_nvrtc'],
    install: 'install the CUDA runtime compiler, for example: pip install nvidia-cuda-nvrtc',
  },
  cublas: {
    title: 'cuBLAS (libcublas)',
    env: ['PD_CUBLAS_LIB'],
    sonames: ['libcublas.so.13', 'libcublas.so.12'],
    pip: ['cu13', 'cublas'],
    install: 'install cuBLAS, for example: pip install nvidia-cublas',
  },
  cublasLt: {
    title: 'cuBLASLt (libcublasLt)',
    env: ['PD_CUBLASLT_LIB'],
    sonames: ['libcublasLt.so.13', 'libcublasLt.so.12'],
    pip: ['cu13', 'cublas'],
    install: 'install cuBLAS, for example: pip install nvidia-cublas',
  },
};

export interface Candidate {
  readonly path: string;
  /** For people: `PD_NCCL_LIB`, `the loader's path`, ... */
  readonly source: string;
}

/** The file that an environment variable names (or a flag, which sets it): then nothing else is tried. */
export function explicitCandidate(
  name: LibraryName,
  env: Readonly<Record<string, string | undefined>> = process.env,
): Candidate | undefined {
  for (const variable of LIBRARIES[name].env) {
    const path = env[variable];
    if (path) return { path, source: variable };
  }
  return undefined;
}

/**
 * Candidates in order: the loader's path, CUDA's usual places, pip's packages. `major`: the newest CUDA that the driver supports; newer
 * libraries are left out, since a CUDA 13 runtime refuses a CUDA 12 driver.
 */
export function candidates(name: LibraryName, major?: number): Candidate[] {
  const { pip } = LIBRARIES[name];
  const sonames = LIBRARIES[name].sonames.filter((soname) => fits(soname, major));
  const found: Candidate[] = sonames.map((path) => ({ path, source: "the loader's path" }));
  for (const folder of cudaFolders()) {
    for (const soname of sonames) found.push({ path: join(folder, soname), source: "CUDA's usual places" });
  }
  for (const site of sitePackages()) {
    for (const folder of pip) {
      for (const soname of sonames) {
        const path = join(site, 'nvidia', folder, 'lib', soname);
        if (existsSync(path)) found.push({ path, source: "pip's nvidia packages" });
      }
    }
  }
  return found;
}

/** Only libraries whose number is CUDA's major version can be too new for the driver. */
function fits(soname: string, major: number | undefined): boolean {
  const number = Number(/\.so\.(\d+)$/.exec(soname)?.[1]);
  return major === undefined || number < 10 || number <= major;
}

function cudaFolders(): string[] {
  const { CUDA_HOME, CUDA_PATH } = process.env;
  const homes = [CUDA_HOME, CUDA_PATH, '/usr/local/cuda'].filter((home) => home !== undefined && home !== '');
  return [
    ...homes.flatMap((home) => [join(home!, 'lib64'), join(home!, 'targets/x86_64-linux/lib')]),
    '/usr/local/nvidia/lib64',
    '/usr/lib/x86_64-linux-gnu',
    '/usr/lib64',
    '/usr/lib/wsl/lib',
  ].filter((folder) => existsSync(folder));
}

/** Directories of Python packages: of the active environment, of the user, of the system, and under /opt. */
function sitePackages(): string[] {
  const { VIRTUAL_ENV, CONDA_PREFIX, HOME } = process.env;
  const prefixes = [VIRTUAL_ENV, CONDA_PREFIX, HOME && join(HOME, '.local'), '/usr', '/usr/local'];
  for (const name of list('/opt')) prefixes.push(join('/opt', name), join('/opt', name, '.venv'));
  const folders: string[] = [];
  for (const prefix of new Set(prefixes)) {
    if (!prefix) continue;
    const lib = join(prefix, 'lib');
    for (const python of list(lib)) {
      if (!python.startsWith('python3')) continue;
      for (const kind of ['site-packages', 'dist-packages']) {
        const folder = join(lib, python, kind);
        if (existsSync(join(folder, 'nvidia'))) folders.push(folder);
      }
    }
  }
  return folders;
}

function list(folder: string): string[] {
  try {
    return readdirSync(folder).sort().reverse();
  } catch {
    return [];
  }
}
