/** The machine that a result was measured on, and its clock. */
import { execFile } from 'node:child_process';
import { cpus, totalmem } from 'node:os';
import { promisify } from 'node:util';
import { packageVersion } from '../../src/version.ts';

export interface Machine {
  readonly program: string;
  readonly node: string;
  readonly cpu: string;
  readonly cores: number;
  readonly memoryGib: number;
  /** Version of NVIDIA's driver, from nvidia-smi. */
  readonly driver?: string;
}

export interface Environment {
  readonly libraries: readonly string[];
  readonly gpus: readonly string[];
  /** Between the first two GPUs. */
  readonly link?: string;
}

export async function readMachine(): Promise<Machine> {
  const processors = cpus();
  const driver = await nvidiaSmi('driver_version');
  return {
    program: `pd-worker ${packageVersion()}`,
    node: process.versions.node,
    cpu: processors[0]?.model.trim() ?? 'unknown',
    cores: processors.length,
    memoryGib: Math.round(totalmem() / 2 ** 30),
    ...(driver && { driver }),
  };
}

/** Libraries and GPUs as this process sees them. With `cuda` it creates a context on every GPU. */
export async function readEnvironment(kind: 'host' | 'cuda'): Promise<Environment> {
  if (kind === 'host') return { libraries: [], gpus: [] };
  const { inspectGpus, inspectLibraries } = await import('../../src/doctor/inspect.ts');
  const libraries = inspectLibraries().map((library) =>
    library.ok ? `${library.name} ${library.version}` : `${library.name}: ${library.error}`,
  );
  const { gpus } = inspectGpus();
  const link = gpus[0]?.links[1];
  return {
    libraries,
    gpus: gpus.map(
      ({ index, name, totalBytes }) => `cuda:${index} ${name}, ${(totalBytes / 1e9).toFixed(0)} GB`,
    ),
    ...(link && { link }),
  };
}

/** One field of the first GPU; undefined if nvidia-smi is missing or does not answer. */
async function nvidiaSmi(field: string): Promise<string | undefined> {
  try {
    const { stdout } = await promisify(execFile)(
      'nvidia-smi',
      [`--query-gpu=${field}`, '--format=csv,noheader'],
      { timeout: 10_000 },
    );
    return stdout.split('\n')[0]?.trim() || undefined;
  } catch {
    return undefined;
  }
}

/** `2x-nvidia-h200` or `host`, for file names. `gpus` as in `Environment`. */
export function hardwareName(gpus: readonly string[]): string {
  const name = /^cuda:\d+ (.*), \d+ GB$/.exec(gpus[0] ?? '')?.[1];
  if (name === undefined) return 'host';
  return `${gpus.length}x-${name.toLowerCase().replace(/[^a-z0-9]+/g, '-')}`;
}

export { monotonicMs } from '../../src/observability/timelines.ts';
