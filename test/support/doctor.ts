/** What pd-doctor finds: as a program, with its exit status, or one section of it. */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { type DoctorReport, type Finding, reportOf } from '../../src/doctor/finding.ts';
import { proxySection } from '../../src/doctor/proxy-check.ts';
import { workerSection } from '../../src/doctor/worker-state.ts';

const bin = fileURLToPath(new URL('../../bin/pd-doctor', import.meta.url));

export interface Examined {
  /** Of the part that was asked for, whose title begins so; what it says of this machine is another matter. */
  readonly findings: readonly Finding[];
  readonly status: number;
}

/** `prefix`: before the command line, such as that of a network namespace. Each check is waited for, unless `args` say how long. */
export function pdDoctor(
  title: 'System' | 'Worker' | 'Peer',
  args: readonly string[],
  prefix: readonly string[] = [],
): Promise<Examined> {
  const patient = args.includes('--timeout') ? [] : ['--timeout', '60s'];
  const [command, ...rest] = [...prefix, process.execPath, bin, '--json', ...patient, ...args];
  return new Promise((resolve, reject) => {
    execFile(command!, rest, (error, stdout, stderr) => {
      const status = error ? error.code : 0;
      if (typeof status !== 'number' || stdout === '') {
        reject(new Error(`pd-doctor ${args.join(' ')}: ${error?.message}\n${stderr}`));
        return;
      }
      const { sections } = JSON.parse(stdout) as DoctorReport;
      const findings = sections
        .filter((section) => section.title.startsWith(`${title} `))
        .flatMap((s) => s.findings);
      resolve({ findings, status });
    });
  });
}

/**
 * What `--proxy` or `--worker` says. By the program only in a network namespace: it asks the libraries and GPUs of this machine too, each
 * in a process of its own.
 */
export async function examine(
  what: 'proxy' | 'worker',
  url: string,
  prefix: readonly string[],
): Promise<Examined> {
  if (prefix.length === 0) {
    const section = await (what === 'proxy' ? proxySection : workerSection)(url, 60_000);
    return { findings: section.findings, status: reportOf('', [section]).sound ? 0 : 1 };
  }
  return pdDoctor(what === 'proxy' ? 'System' : 'Worker', [`--${what}`, url], prefix);
}

export const failed = ({ findings }: Examined): readonly Finding[] =>
  findings.filter(({ level }) => level === 'fail');
