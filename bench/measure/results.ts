/** What every results script writes: `<date>-<hardware>-<kind>.md` for people, with a common heading, and JSON beside it for programs. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Environment, Machine } from './machine.ts';

const TAIL_LINES = 15;

export interface Results {
  /** Last word of the file's name: `transfer`, `wire`, `pair`, `serve`. */
  readonly kind: string;
  readonly title: string;
  /** `2026-11-21`. */
  readonly date: string;
  /** `2x-nvidia-h200`, `host`. */
  readonly hardware: string;
  /** Markdown list of what it was measured on. */
  readonly machine: readonly string[];
  /** The command line that repeats it. */
  readonly command: string;
  /** The lines below the heading. */
  readonly body: readonly string[];
  /** Absent: Markdown only. */
  readonly json?: object;
}

/** Returns the path of both files without the extension. */
export function writeResults(results: Results, folder: string): string {
  const { kind, date, hardware, json } = results;
  mkdirSync(folder, { recursive: true });
  const base = join(folder, `${date}-${hardware}-${kind}`);
  if (json) writeFileSync(`${base}.json`, `${JSON.stringify(json, undefined, 1)}\n`);
  writeFileSync(`${base}.md`, renderResults(results));
  return base;
}

function renderResults({ title, hardware, date, machine, command, body }: Results): string {
  return `${[
    `# ${title}, ${hardware}, ${date}`,
    '',
    ...(machine.length > 0 ? [...machine, ''] : []),
    `Command: \`${command}\``,
    '',
    ...body,
  ].join('\n')}\n`;
}

/** Markdown list of GPUs and the link between them, CPU, driver and libraries. `prefix` goes before each library. */
export function hardwareLines(
  machine: Machine,
  { gpus, link, libraries }: Environment,
  prefix = '',
): string[] {
  return [
    ...gpus.map((gpu) => `- ${gpu}`),
    ...(link ? [`- link: ${link}`] : []),
    `- ${machine.cores} x ${machine.cpu}, ${machine.memoryGib} GiB`,
    ...(machine.driver ? [`- NVIDIA driver ${machine.driver}`] : []),
    ...libraries.map((library) => `- ${prefix}${library}`),
  ];
}

/** One line if everything passed, else a list item for each problem. */
export function problemLines(problems: readonly string[]): string[] {
  return problems.length === 0 ? ['All passed.'] : problems.map((problem) => `- FAILED: ${problem}`);
}

/** The last lines of a log; empty if there is none. */
export function logTail(path: string): string {
  try {
    return readFileSync(path, 'utf8').trimEnd().split('\n').slice(-TAIL_LINES).join('\n');
  } catch {
    return '';
  }
}

/** Prints the last lines of a results script and sets its exit status: 1 if anything failed. */
export function conclude(text: string, ok: boolean): void {
  console.log(text);
  process.exitCode = ok ? 0 : 1;
}
