/** The questions of a probe that need koffi. */
import { LIBRARIES, type LibraryName } from '../../ffi/find.ts';
import { loadLibrary } from '../../ffi/load.ts';
import { koffiVersion } from '../../ffi/native.ts';
import { shippedArch } from '../device/cuda/kernels.ts';
import { PdError } from '../errors.ts';
import { inspectGpus, inspectLibraries, visibleGpus } from './inspect.ts';

export function answerNative(question: string, args: readonly string[]): unknown {
  switch (question) {
    case 'koffi':
      return { version: koffiVersion() };
    case 'libraries':
      return { libraries: inspectLibraries() };
    case 'gpus': {
      const { gpus, ...rest } = inspectGpus();
      return {
        ...rest,
        gpus: gpus.map((gpu) => ({ ...gpu, machineCode: machineCode(gpu.computeCapability) })),
      };
    }
    case 'visible-gpus':
      return visibleGpus(args.map(libraryName));
    default:
      loadLibrary(libraryName(question.replace(/^load-/, '')));
      return { loads: true };
  }
}

function machineCode(computeCapability: string): string | null {
  const [major = 0, minor = 0] = computeCapability.split('.').map(Number);
  return shippedArch(major, minor) ?? null;
}

function libraryName(text: string): LibraryName {
  const name = (Object.keys(LIBRARIES) as LibraryName[]).find((known) => known === text);
  if (name === undefined) throw new PdError('INTERNAL', `no such question: ${text}`);
  return name;
}
