/** What this machine has, for pd-doctor and bug reports: every library and GPU, found or not, with what is wrong. */
import { explicitCandidate, LIBRARIES, type LibraryName } from '../../ffi/find.ts';
import { inspectCublas } from '../../ffi/libcublas.ts';
import { type Libcuda, loadLibcuda, NO_DEVICE } from '../../ffi/libcuda.ts';
import { loadCudart } from '../../ffi/libcudart.ts';
import { loadLibnccl } from '../../ffi/libnccl.ts';
import { libraryFile, loadLibrary } from '../../ffi/load.ts';
import { koffiVersion, type NativeLibrary } from '../../ffi/native.ts';
import { loadNvrtc } from '../../ffi/nvrtc.ts';
import type { DriverAnswer } from '../config/device-choice.ts';
import { shippedArch } from '../device/cuda/kernels.ts';
import { PdError } from '../errors.ts';

export type LibraryReport = {
  readonly name: LibraryName;
  /** The environment variable that names the file, if one does. */
  readonly named?: string;
} & (
  | { readonly ok: true; readonly file: string; readonly version: string }
  | { readonly ok: false; readonly error: string; readonly install: string }
);

export interface GpuReport {
  readonly index: number;
  readonly name: string;
  readonly computeCapability: string;
  /** The shipped machine code that runs on it; null if kernels come from PTX or the compiler. */
  readonly machineCode: string | null;
  readonly busId: string;
  readonly freeBytes: number;
  readonly totalBytes: number;
  /** To each GPU by index; undefined for itself. */
  readonly links: readonly ('nvlink' | 'pcie' | 'none' | undefined)[];
}

/** The questions of a probe that need koffi. */
export function answerNative(question: string, args: readonly string[]): unknown {
  switch (question) {
    case 'koffi':
      return { version: koffiVersion() };
    case 'libraries':
      return { libraries: inspectLibraries() };
    case 'gpus':
      return inspectGpus();
    case 'visible-gpus':
      return visibleGpus(args.map(libraryName));
    default:
      loadLibrary(libraryName(question.replace(/^load-/, '')));
      return { loads: true };
  }
}

function libraryName(text: string): LibraryName {
  const name = (Object.keys(LIBRARIES) as LibraryName[]).find((known) => known === text);
  if (name === undefined) throw new PdError('INTERNAL', `no such question: ${text}`);
  return name;
}

/** Loads what it reports on, and a broken library can end the process: call it in a process of its own where that matters. */
export function inspectLibraries(): LibraryReport[] {
  return [
    report('cuda', () => {
      const driver = loadLibcuda();
      return { library: driver.library, version: `runs CUDA ${cudaVersion(driver.driverVersion())}` };
    }),
    report('cudart', () => {
      const runtime = loadCudart();
      return { library: runtime.library, version: cudaVersion(runtime.version()) };
    }),
    report('nccl', () => {
      const nccl = loadLibnccl();
      return { library: nccl.library, version: nccl.versionText };
    }),
    report('nvrtc', () => {
      const nvrtc = loadNvrtc(Math.trunc(loadLibcuda().driverVersion() / 1000));
      return { library: nvrtc.library, version: nvrtc.version() };
    }),
    report('cublas', inspectCublas),
  ];
}

/** Every GPU this process sees. Creates a context on each: about 0.3 s, and some 500 MiB of its memory until the process ends. */
export function inspectGpus(): { readonly gpus: readonly GpuReport[]; readonly error?: string } {
  const gpus: GpuReport[] = [];
  try {
    const runtime = loadCudart();
    const driver = loadLibcuda();
    const count = runtime.deviceCount();
    const all = Array.from({ length: count }, (_, index) => index);
    for (const index of all) {
      runtime.setDevice(index);
      const { free, total } = runtime.memoryInfo();
      const major = runtime.attribute(index, 'computeMajor');
      const minor = runtime.attribute(index, 'computeMinor');
      gpus.push({
        index,
        name: driver.deviceName(index),
        computeCapability: `${major}.${minor}`,
        machineCode: shippedArch(major, minor) ?? null,
        busId: runtime.pciBusId(index),
        freeBytes: free,
        totalBytes: total,
        links: all.map((peer) => (peer === index ? undefined : runtime.peerLink(index, peer))),
      });
    }
    return { gpus };
  } catch (error) {
    return { gpus, error: PdError.from(error, 'CUDA_ERROR').message };
  }
}

/**
 * The GPUs that the driver shows this process, and whether the CUDA runtime and the other `libraries` of a worker load for them.
 * Creates no context, so it is quick and takes no GPU memory. Never throws, but a broken library can end the process.
 */
function visibleGpus(libraries: readonly LibraryName[]): DriverAnswer {
  let driver: Libcuda;
  try {
    loadLibrary('cuda');
  } catch (error) {
    return { kind: 'not-loadable', error: PdError.from(error).toData() };
  }
  let names: string[];
  try {
    driver = loadLibcuda();
    names = Array.from({ length: driver.deviceCount() }, (_, index) => driver.deviceName(index));
  } catch (cause) {
    const error = PdError.from(cause, 'CUDA_ERROR');
    if (error.context['status'] === NO_DEVICE) return { kind: 'no-gpu', unhidden: 0 };
    return { kind: 'fails', error: error.toData() };
  }
  if (names.length === 0) return { kind: 'no-gpu', unhidden: 0 };
  try {
    for (const name of libraries) loadForWorker(name, driver);
    return { kind: 'gpus', names };
  } catch (error) {
    return { kind: 'gpus', names, problem: PdError.from(error, 'CUDA_ERROR').toData() };
  }
}

/** The way a worker does, so that it fails here as it would there. */
function loadForWorker(name: LibraryName, driver: Libcuda): void {
  switch (name) {
    case 'cudart':
      loadCudart().deviceCount();
      return;
    case 'nccl':
      loadLibnccl();
      return;
    default:
      loadLibrary(name, Math.trunc(driver.driverVersion() / 1000));
  }
}

function report(
  name: LibraryName,
  load: () => { readonly library: NativeLibrary; readonly version: string },
): LibraryReport {
  const source = explicitCandidate(name)?.source;
  const named = source === undefined ? {} : { named: source };
  try {
    const { library, version } = load();
    return { name, ...named, ok: true, file: libraryFile(library), version };
  } catch (error) {
    const { message } = PdError.from(error, 'CUDA_ERROR');
    return { name, ...named, ok: false, error: message, install: LIBRARIES[name].install };
  }
}

function cudaVersion(version: number): string {
  return `${Math.trunc(version / 1000)}.${Math.trunc((version % 1000) / 10)}`;
}
