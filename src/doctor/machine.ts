/** Node, the native libraries and the GPUs of this machine. */
import { readFileSync } from 'node:fs';
import { LIBRARIES, type LibraryName } from '../../ffi/find.ts';
import { PdError } from '../errors.ts';
import { binarySize } from '../observability/bytes.ts';
import { type Finding, fail, info, ok, type Section, warn } from './finding.ts';
import type { GpuReport, LibraryReport } from './inspect.ts';
import { hasCrashed, probe } from './probe.ts';

/** package.json: engines. */
const LEAST_NODE = [20, 19] as const;
/** From this NCCL on, one thread may have several communicators in progress; with older ones pairs open one at a time. */
const FULL_NCCL = [2, 27] as const;
/** What a worker on cuda cannot run without. */
const NEEDED: readonly LibraryName[] = ['cuda', 'cudart', 'nccl'];

export async function runtimeSection(timeoutMs: number): Promise<Section> {
  const { node } = process.versions;
  const findings: Finding[] = [
    atLeast(node, LEAST_NODE)
      ? ok(`Node ${node} (${process.execPath}), ${process.platform} ${process.arch}${libc()}`)
      : fail(
          `Node ${node} (${process.execPath}) is too old`,
          `install Node ${LEAST_NODE.join('.')} or later`,
        ),
  ];
  const modules = await Promise.all([
    moduleFinding('koffi', 'calls CUDA and NCCL', timeoutMs),
    moduleFinding('zeromq', 'carries announcements and pings', timeoutMs),
  ]);
  return { title: 'Node', findings: [...findings, ...modules] };
}

async function moduleFinding(name: 'koffi' | 'zeromq', does: string, timeoutMs: number): Promise<Finding> {
  try {
    return ok(
      `${name}${name === 'zeromq' ? ': libzmq' : ''} ${(await probe(name, timeoutMs)).version} loads (${does})`,
    );
  } catch (cause) {
    return fail(
      `${name}, which ${does}, does not load: ${PdError.from(cause).message}`,
      'run npm ci on this machine, or use the archive that npm run bundle builds for it',
    );
  }
}

export interface Gpus {
  readonly sections: readonly Section[];
  readonly gpus: readonly GpuReport[];
}

/** `device` as given to a worker: `host` or `cuda:N`. A machine without a GPU is fine unless one is asked for. */
export async function gpuSections(device: string, timeoutMs: number): Promise<Gpus> {
  const [libraries, inspected] = await Promise.all([
    probe('libraries', timeoutMs).catch((error: unknown) => PdError.from(error)),
    probe('gpus', timeoutMs).catch((error: unknown) => PdError.from(error)),
  ]);
  const { gpus, error } =
    inspected instanceof PdError
      ? { gpus: [], error: `the process that asks the GPUs ${inspected.message}` }
      : inspected;
  const driver = driverVersion();
  const usable =
    !(libraries instanceof PdError) &&
    libraries.libraries.some((library) => library.name === 'cuda' && library.ok);
  // If a GPU can be used, people want to know about a worker on it.
  const needed = device !== 'host' || gpus.length > 0 || usable;
  if (!needed && driver === undefined && !(libraries instanceof PdError)) {
    const findings = [info('no NVIDIA GPU or driver here: workers run on --device host, KV moves over TCP')];
    return { sections: [{ title: 'GPUs', findings }], gpus };
  }
  const found =
    libraries instanceof PdError
      ? await crashFindings(libraries, timeoutMs)
      : libraries.libraries.map((library) => libraryFinding(library, needed));
  const explained = found.some(({ level }) => level === 'fail') && gpus.length === 0;
  return {
    sections: [
      { title: 'Libraries', findings: found },
      { title: 'GPUs', findings: gpuFindings(gpus, explained ? undefined : error, device, driver) },
    ],
    gpus,
  };
}

function libraryFinding(library: LibraryReport, needed: boolean): Finding {
  const { name } = library;
  const by = library.named === undefined ? '' : `, named by ${library.named}`;
  if (library.ok) {
    const found = `${name} ${library.version} (${library.file}${by})`;
    return name === 'nccl' && !atLeast(library.version, FULL_NCCL)
      ? warn(
          `${found}: pairs open one at a time`,
          `install NCCL ${FULL_NCCL.join('.')} or later on both ends`,
        )
      : ok(found);
  }
  if (name === 'nvrtc') {
    return info(`nvrtc: not found${by}; needed only if no shipped kernel fits the GPU (${library.install})`);
  }
  if (name === 'cublas') {
    const text = `cublas: not found${by}; without it workers cannot compute on a GPU (${library.install}, or --executor host)`;
    return needed ? warn(text) : info(text);
  }
  if (name === 'cudart' && library.error.includes('(libcuda)')) return info(`${name}: needs cuda first`);
  const text = `${name}${by}: ${compact(library.error)}`;
  return needed ? fail(text, `${library.install}, or set ${LIBRARIES[name].env[0]} to the file`) : info(text);
}

/** One of them brought the child process down: which? */
async function crashFindings(crash: PdError, timeoutMs: number): Promise<Finding[]> {
  if (!hasCrashed(crash)) return [fail(crash.message, 'run npm ci again')];
  const findings = await Promise.all(
    NEEDED.concat('nvrtc', 'cublas').map(async (name): Promise<Finding> => {
      try {
        await probe(`load-${name}`, timeoutMs);
        return info(`${name} loads by itself`);
      } catch (cause) {
        const error = PdError.from(cause);
        if (!hasCrashed(error)) return info(`${name}: ${error.message}`);
        return fail(
          `${name}: the process that loads it ${error.message}`,
          `${LIBRARIES[name].install}, or set ${LIBRARIES[name].env[0]} to another file`,
        );
      }
    }),
  );
  if (!findings.some(({ level }) => level === 'fail')) {
    const fix = 'check whether nvidia-smi works; reinstall the driver';
    findings.push(fail(`the process that asks the libraries ${crash.message}`, fix));
  }
  return findings;
}

function gpuFindings(
  gpus: readonly GpuReport[],
  error: string | undefined,
  device: string,
  driver: string | undefined,
): Finding[] {
  const findings: Finding[] = driver === undefined ? [] : [ok(`NVIDIA driver ${driver}`)];
  for (const gpu of gpus) {
    const { index, name, computeCapability, freeBytes, totalBytes, busId } = gpu;
    const [major = 0] = computeCapability.split('.').map(Number);
    const kernels = gpu.machineCode === null ? 'kernels from PTX or NVRTC' : `kernels ${gpu.machineCode}`;
    const text = `cuda:${index}  ${name}, ${binarySize(totalBytes)} (${binarySize(freeBytes)} free), compute ${computeCapability}, ${kernels}, PCI ${busId}`;
    findings.push(
      major < 7
        ? warn(`${text}: NCCL and the kernels are not tested below 7.0`)
        : freeBytes < totalBytes / 10
          ? warn(`${text}: nearly full`, 'nvidia-smi lists who uses it; choose another with --device cuda:N')
          : ok(text),
    );
  }
  findings.push(...linkFindings(gpus));
  const wanted = /^cuda:(\d+)$/.exec(device)?.[1];
  if (error !== undefined) {
    findings.push(
      fail(
        `CUDA cannot be used: ${error}`,
        'check whether nvidia-smi works; start a container with --gpus all',
      ),
    );
  } else if (wanted !== undefined && Number(wanted) >= gpus.length) {
    const visible = process.env['CUDA_VISIBLE_DEVICES'];
    const here = gpus.length === 0 ? 'none' : `cuda:0 to cuda:${gpus.length - 1}`;
    findings.push(
      fail(
        `--device ${device} does not exist: this process sees ${here}`,
        visible === undefined
          ? 'choose one that does, or --device host'
          : `fix CUDA_VISIBLE_DEVICES=${visible}, or choose another`,
      ),
    );
  } else if (gpus.length === 1) {
    findings.push(
      info(
        'one GPU: a producer and a consumer may share it natively (pd-launch --device cuda:0); by the frozen wire each needs its own, since NCCL refuses two ranks on one',
      ),
    );
  }
  return findings;
}

const LINKS = {
  nvlink: { level: 'ok', text: 'are linked by NVLink: --nccl-num-channels 16 or 32' },
  pcie: { level: 'ok', text: 'are linked by PCIe: --nccl-num-channels 8' },
  none: { level: 'warn', text: 'have no peer access: NCCL goes through host memory, many times slower' },
} as const;

/** One line per kind of connection, with the pairs it holds for. */
function linkFindings(gpus: readonly GpuReport[]): Finding[] {
  return (['nvlink', 'pcie', 'none'] as const).flatMap((kind): Finding[] => {
    const pairs = gpus.flatMap(({ index, links }) =>
      links.flatMap((link, peer) => (link === kind && index < peer ? [`${index}-${peer}`] : [])),
    );
    if (pairs.length === 0) return [];
    const { level, text } = LINKS[kind];
    const which = `pairs ${pairs.join(' ')} ${text}`;
    return [
      level === 'ok' ? ok(which) : warn(which, 'in a virtual machine: enable peer access between GPUs'),
    ];
  });
}

/** Of the kernel module, such as `580.95.05`; undefined if none is loaded. */
function driverVersion(): string | undefined {
  try {
    const text = readFileSync('/proc/driver/nvidia/version', 'utf8');
    return /Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s/.exec(text)?.[1] ?? 'of unknown version';
  } catch {
    return undefined;
  }
}

function atLeast(version: string, least: readonly [number, number]): boolean {
  const [major = 0, minor = 0] = version.split('.').map(Number);
  return major > least[0] || (major === least[0] && minor >= least[1]);
}

function libc(): string {
  const { header } = process.report.getReport() as { header?: { glibcVersionRuntime?: string } };
  return header?.glibcVersionRuntime === undefined ? '' : `, glibc ${header.glibcVersionRuntime}`;
}

/** Without the loader's words for a missing file, which add nothing to the list of directories, and without the fix, shown separately. */
function compact(error: string): string {
  return error
    .replaceAll(/: cannot open shared object file: No such file or directory/g, '')
    .replace(/\. To fix it: .*$/, '');
}
