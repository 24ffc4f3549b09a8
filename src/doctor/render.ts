/** The report as one page of text. */
import { Help } from 'commander';
import { plural } from '../observability/bytes.ts';
import type { DoctorReport, Finding, Level } from './finding.ts';

const MARKS: Readonly<Record<Level, string>> = { ok: 'ok  ', info: '    ', warn: 'warn', fail: 'FAIL' };
const COLOURS: Readonly<Record<Level, number>> = { ok: 32, info: 90, warn: 33, fail: 31 };
const INDENT = ' '.repeat(7);

export interface RenderOptions {
  readonly colour: boolean;
  /** Characters per line. */
  readonly width: number;
}

export function renderReport(report: DoctorReport, options: RenderOptions): string {
  const lines = [`pd-doctor ${report.version}`];
  for (const { title, findings } of report.sections) {
    lines.push('', title, ...findings.flatMap((finding) => renderFinding(finding, options)));
  }
  const all = report.sections.flatMap(({ findings }) => findings);
  const count = (level: Level) => all.filter((finding) => finding.level === level).length;
  const warnings = count('warn') === 0 ? '' : `, ${plural(count('warn'), 'warning')}`;
  lines.push('');
  lines.push(
    report.sound ? `no problems found${warnings}` : `${plural(count('fail'), 'failure')}${warnings}`,
  );
  return `${lines.join('\n')}\n`;
}

function renderFinding({ level, what, fix }: Finding, { colour, width }: RenderOptions): string[] {
  const mark = colour ? `\u001b[${COLOURS[level]}m${MARKS[level]}\u001b[0m` : MARKS[level];
  const [first, ...rest] = wrap(what, width - INDENT.length);
  const lines = [`  ${mark} ${first ?? ''}`, ...rest.map((line) => `${INDENT}${line}`)];
  if (fix !== undefined) {
    lines.push(...wrap(`-> ${fix}`, width - INDENT.length).map((line) => `${INDENT}${line}`));
  }
  return lines;
}

function wrap(text: string, width: number): string[] {
  return new Help().boxWrap(text, width).split('\n');
}
