/** pd-doctor as a program: what it finds, and its exit status. */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import type { DoctorReport, Finding } from '../../src/doctor/finding.ts';

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

export const failed = ({ findings }: Examined): readonly Finding[] =>
  findings.filter(({ level }) => level === 'fail');
